# SPDX-License-Identifier: Apache-2.0
"""A long training in several sessions: how long it has taken so far, and when the time of a session is up."""

import json
import signal
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from anomalib_intra.benchmark.machine import device_name
from anomalib_intra.training.atomic_file import write_atomically


def read_sessions(path: Path) -> list[dict[str, Any]]:
    """Read what :class:`TimeBudget` has written.

    Args:
        path (Path): JSON file; it need not exist.

    Returns:
        list[dict]: A row for each session: ``device``, ``seconds``, ``epochs`` (all that were done at its end).

    Example:
        >>> read_sessions(Path("there/is/none.json"))
        []
    """
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


class TimeBudget(Callback):
    """Writes down how long a session of a training takes, and stops it when its time is up.

    It stops as Ctrl-C does: the step is ended and ``last.ckpt`` saved.

    Args:
        path (Path): JSON file with the sessions so far; one more is added.
        ends (float | None): When the time is up, on the clock of :func:`time.monotonic`; never by default.

    Attributes:
        is_used_up (bool): Whether it has stopped the training.

    Example:
        >>> TimeBudget(Path("sessions.json"), ends=time.monotonic() + 60).is_used_up
        False
    """

    def __init__(self, path: Path, ends: float | None = None) -> None:
        self.path = path
        self.ends = ends
        self.is_used_up = False
        self._before = read_sessions(path)
        self._epochs = self._before[-1]["epochs"] if self._before else 0
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        del trainer, pl_module
        self._started = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Stop when the time is up."""
        del trainer, pl_module, args, kwargs
        if not self.is_used_up and self.ends is not None and time.monotonic() > self.ends:
            self.is_used_up = True
            signal.raise_signal(signal.SIGINT)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the epoch, and write down the time so far in case no end comes."""
        self._epochs = trainer.current_epoch + 1
        self._write(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write down the time of a session that was stopped."""
        del exception
        if self._started:
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        seconds = time.monotonic() - self._started
        now = {"device": device_name(pl_module.device), "seconds": round(seconds, 1), "epochs": self._epochs}
        write_atomically(self.path, json.dumps([*self._before, now], indent=2))
