# SPDX-License-Identifier: Apache-2.0
"""What a training step takes on this machine."""

import time
from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
from torch.utils.data import DataLoader

from anomalib_intra.benchmark.machine import wait_for
from anomalib_intra.components.reconstruction_module import ReconstructionModule
from anomalib_intra.data.samples import Prepared, SampleLoader

#: Images that training samples are taken of.
_TRAINING_IMAGES = 4


def time_training(
    model: ReconstructionModule,
    steps: int,
    device: torch.device,
    autocast: Callable[[], Any],
    sampled_before: bool = False,
) -> float:
    """Time training steps with the model's own optimizer on random images, from sampling to the changed weights.

    Args:
        model (ReconstructionModule): Model on the device; its weights change.
        steps (int): Steps that are timed, after one that is not.
        device (torch.device): The device.
        autocast (Callable): Makes a context of the precision, such as ``contextlib.nullcontext``.
        sampled_before (bool): Take the same samples in every step, taken before the clock starts: what a step takes
            where nothing waits for data.

    Returns:
        float: Seconds of all steps.
    """
    random: Any = torch.rand(_TRAINING_IMAGES, 3, *model.image_size)  # as good as a Dataset
    images = DataLoader(random, generator=torch.Generator())
    sample, _, per_step = model.sampling
    per_image = -(-(steps + 1) * per_step // _TRAINING_IMAGES)
    loader = SampleLoader(
        images,
        lambda x: Prepared(x.to(device), ["random"] * len(x)),
        sample,
        per_image,
        per_step,
        model.image_size,
        seed=0,
    )
    with autocast():  # some optimizers compute in the precision of the training
        optimizer = _optimizer_of(model)
    model.train()
    started = 0.0
    batches = repeat(next(iter(loader))) if sampled_before else loader
    for number, batch in enumerate(batches):
        with autocast():
            loss = model.loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number == 0:
            wait_for(device)
            started = time.perf_counter()
        if number == steps:
            break
    wait_for(device)
    seconds = time.perf_counter() - started
    model.eval()
    return seconds


def _optimizer_of(model: ReconstructionModule) -> torch.optim.Optimizer:
    """The optimizer without its schedule, which goes by a trainer."""
    configured: Any = model.configure_optimizers()
    return configured["optimizer"] if isinstance(configured, dict) else configured
