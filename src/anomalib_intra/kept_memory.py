# SPDX-License-Identifier: Apache-2.0
"""Memory that a training step frees is kept for the next one, on a CPU under Linux.

glibc gives freed memory back to the system and gets it anew, page by page, each filled with zeros first: a fifth of the
time of a training step of the paper's model (docs/performance.md).
"""

import ctypes
import platform
import sys

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_MIB = 2**20


def keep_freed_memory() -> None:
    """Have the process keep the memory that it frees, where the system's C library is glibc.

    Example:
        >>> keep_freed_memory()
        >>> give_back_freed_memory()
    """
    _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: -1})


def give_back_freed_memory() -> None:
    """Give kept memory back to the system, and from now on what is freed, as before."""
    # 64 and 32 MiB are where glibc's own thresholds end in a process that frees large blocks, and 65,536 its default.
    _set({_MMAP_MAX: 65_536, _MMAP_THRESHOLD: 32 * _MIB, _TRIM_THRESHOLD: 64 * _MIB})
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _set(values: dict[int, int]) -> None:
    if _is_glibc():
        for parameter, value in values.items():
            ctypes.CDLL(None).mallopt(parameter, value)


def _is_glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


class KeptMemory(Callback):
    """Keeps freed memory while a model is trained on a CPU, and gives it back in the end, also after an error."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to keep it.

        Args:
            trainer (Trainer): The trainer.
            pl_module (LightningModule): The model.
        """
        del pl_module
        if trainer.strategy.root_device == torch.device("cpu"):
            keep_freed_memory()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give it back.

        Args:
            trainer (Trainer): The trainer.
            pl_module (LightningModule): The model.
        """
        del pl_module
        if trainer.strategy.root_device == torch.device("cpu"):
            give_back_freed_memory()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give it back.

        Args:
            trainer (Trainer): The trainer.
            pl_module (LightningModule): The model.
            exception (BaseException): What ended the training.
        """
        del exception
        if trainer.state.fn == "fit":
            self.on_fit_end(trainer, pl_module)
