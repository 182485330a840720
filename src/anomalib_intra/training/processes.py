# SPDX-License-Identifier: Apache-2.0
"""What the processes of one run tell each other, and the folder they share."""

from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from torch import distributed
from torchmetrics.utilities.distributed import gather_all_tensors

from anomalib_intra.training.internals import point_latest_to, set_run_folder


def gathered(values: torch.Tensor) -> torch.Tensor:
    """Put together what all processes have.

    Args:
        values (torch.Tensor): Values of this process, on its device; the first dimension may differ between processes.

    Returns:
        torch.Tensor: The values of all, in the order of the processes; those of this one where it is alone.

    Example:
        >>> gathered(torch.arange(3))
        tensor([0, 1, 2])
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    return torch.cat(gather_all_tensors(values))


def share_run_folder(trainer: Trainer) -> None:
    """Let every process write into the folder of the first one.

    anomalib's Engine runs in every process and makes each a versioned folder of its own (v0, v1, ...), with ``latest``
    pointing to whichever came last.

    Args:
        trainer (Trainer): The trainer of this process.
    """
    own = Path(trainer.default_root_dir)
    shared = Path(trainer.strategy.broadcast(str(own)))
    if own != shared:
        set_run_folder(trainer, shared)
        with suppress(OSError):  # not empty, or on another machine
            own.rmdir()
    trainer.strategy.barrier("run folder")
    if trainer.is_global_zero:
        point_latest_to(shared)


def share_of_time(timer: Timer, trainer: Trainer) -> float:
    """How much of a trainer's ``max_time`` has passed, by the clock of the first process.

    By clocks of their own, processes would take other learning rates.

    Args:
        timer (Timer): What ``max_time`` has made of itself.
        trainer (Trainer): The trainer of this process.

    Returns:
        float: Share of the time, 0 where it has no end; a little more than 1 when it is up.
    """
    passed, left = timer.time_elapsed(), timer.time_remaining()
    share: float = trainer.strategy.broadcast(0.0 if left is None else passed / (passed + left))
    return share
