# SPDX-License-Identifier: Apache-2.0
"""Memory that a training step frees is kept for the next one, on a CPU under Linux.

glibc gives freed memory back to the system and gets it anew, page by page, each filled with zeros first: 18 % of the
time of a training step of the paper's model (docs/performance.md).
"""

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

# Parameters of glibc's mallopt, and the variables of the environment that set the same.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_SET_BY_THE_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")
_MIB = 2**20


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Have the process keep the memory that it frees, and give it back in the end.

    Does nothing where the device is no CPU, where the system's C library is not glibc, and where the environment says
    itself what glibc is to do (such as ``MALLOC_TRIM_THRESHOLD_``).

    Args:
        device (torch.device): Device that is computed on.

    Yields:
        None: While memory is kept.

    Example:
        >>> with kept_memory(torch.device("cpu")):
        ...     ones = torch.ones(2**20)
    """
    glibc = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
    if device.type != "cpu" or not glibc or any(name in os.environ for name in _SET_BY_THE_USER):
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        # glibc's default number, and the thresholds at which it arrives by itself where large blocks are freed.
        libc.mallopt(_MMAP_MAX, 65_536)
        libc.mallopt(_MMAP_THRESHOLD, 32 * _MIB)
        libc.mallopt(_TRIM_THRESHOLD, 64 * _MIB)
        libc.malloc_trim(0)


class KeptMemory(Callback):
    """Keeps freed memory while a model is trained, and gives it back in the end, also after an error."""

    def __init__(self) -> None:
        self._kept = ExitStack()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to keep it.

        Args:
            trainer (Trainer): The trainer.
            pl_module (LightningModule): The model.
        """
        del pl_module
        self._kept.enter_context(kept_memory(trainer.strategy.root_device))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give it back.

        Args:
            trainer (Trainer): The trainer.
            pl_module (LightningModule): The model.
        """
        del trainer, pl_module
        self._kept.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give it back.

        Args:
            trainer (Trainer): The trainer.
            pl_module (LightningModule): The model.
            exception (BaseException): What ended the training.
        """
        del trainer, pl_module, exception
        self._kept.close()
