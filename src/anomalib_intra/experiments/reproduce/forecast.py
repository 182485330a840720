# SPDX-License-Identifier: Apache-2.0
"""How long a training will take, from the speed of a few steps on this machine."""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from anomalib_intra.experiments.speed.command import workload_of
from anomalib_intra.experiments.speed.training import time_training
from anomalib_intra.experiments.train_command import TrainCommand
from anomalib_intra.one_pass.lightning_model import OnePassInTra

#: Seconds for which training steps are timed, about.
_SECONDS = 2.0


def forecast(command: TrainCommand, epochs: int | None, last: Path) -> float:
    """Predict how long a training will take.

    Args:
        command (TrainCommand): What is to be trained, with its datamodule set up.
        epochs (int | None): Epochs that are left; None if there is no end to them.
        last (Path): Checkpoint that it goes on from, if it is there.

    Returns:
        float: Seconds, validation included; of a model that trains for a time, what is left of that, without.
    """
    if epochs == 0:
        return 0.0
    if isinstance(command.model, OnePassInTra) and command.model.minutes is not None:
        trained = torch.load(last, map_location="cpu", weights_only=True)["seconds_trained"] if last.is_file() else 0.0
        return max(0.0, 60 * command.model.minutes - trained)
    assert epochs is not None, "nothing else ends without"
    trainer = command.settings.get("trainer", {})
    accelerator = None if trainer.get("accelerator") == "cpu" else torch.accelerator.current_accelerator(True)
    device = accelerator or torch.device("cpu")
    autocast: Callable[[], Any] = nullcontext
    if trainer.get("precision") == "bf16-mixed":
        autocast = partial(torch.autocast, device.type, torch.bfloat16)
    model = copy.deepcopy(command.model).to(device)
    steps, seconds = 1, time_training(model, 1, device, autocast)
    if seconds < _SECONDS:
        steps = math.ceil(_SECONDS / seconds)
        seconds = time_training(model, steps, device, autocast)

    work = workload_of(model)
    _, per_image, per_step = model.sampling
    trained = len(command.datamodule.train_data) * per_image
    # A forward pass is a third of a training step.
    validated = len(command.datamodule.val_data) * work.flops_of_an_image / work.flops_of_a_sample / 3
    return epochs * (trained + validated) * seconds / (steps * per_step)
