# SPDX-License-Identifier: Apache-2.0
"""How long a training will take, from the speed of a few steps on this machine."""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from anomalib_intra.experiments.speed import time_training
from anomalib_intra.experiments.train_command import TrainCommand

#: Seconds for which training steps are timed, about.
_SECONDS = 2.0


def forecast(command: TrainCommand, epochs: int) -> float:
    """Predict how long a training will take.

    Args:
        command (TrainCommand): What is to be trained, with its datamodule set up.
        epochs (int): Epochs that are left.

    Returns:
        float: Seconds, validation included.
    """
    if epochs == 0:
        return 0.0
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

    height, width = command.model.model.grid
    trained = len(command.datamodule.train_data) * command.model.windows_per_image
    # A forward pass is a third of a training step.
    validated = len(command.datamodule.val_data) * height * width / 3
    return epochs * (trained + validated) * seconds / (steps * model.window_batch_size)
