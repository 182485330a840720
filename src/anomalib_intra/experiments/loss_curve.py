# SPDX-License-Identifier: Apache-2.0
"""The validation losses of a training in a file that survives the training's end, however that comes."""

import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from pandas import Series, read_csv

from anomalib_intra.training.atomic_file import write_atomically


def read_curve(path: Path) -> Series:
    """Read what :class:`LossCurve` has written.

    Args:
        path (Path): CSV file; it need not exist.

    Returns:
        Series: Validation losses by epoch, from 0 on.

    Example:
        >>> len(read_curve(Path("there/is/none.csv")))
        0
    """
    if not path.is_file():
        return Series(dtype=float, name="val_loss").rename_axis("epoch")
    return read_csv(path, index_col="epoch", float_precision="round_trip")["val_loss"]


class LossCurve(Callback):
    """Keeps the validation loss of every epoch in a CSV file, and prints a line with the time that is left.

    The file is replaced as a whole after each epoch, so it is never half written. It is written before the epoch's
    checkpoint is: a training that is killed in between repeats the epoch, whose line then takes the place of the old.

    Args:
        path (Path): CSV file with ``epoch`` and ``val_loss``.
        name (str): What is trained, for the printed line.
        epochs (int | None): Epochs of this training; None for a model that ends it by itself, by its time.
        to_come (int): Epochs of the trainings after it, taken to last as long as those of this one.

    Raises:
        ValueError: While training, if there is no ``val_loss`` or it is not finite.
    """

    def __init__(self, path: Path, name: str, epochs: int | None, to_come: int = 0) -> None:
        self.path = path
        self.name = name
        self.epochs = epochs
        self.to_come = to_come
        self._started = 0.0
        self._first_epoch = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        del pl_module
        self._started, self._first_epoch = time.monotonic(), trainer.current_epoch

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the loss of the epoch."""
        epoch, loss = trainer.current_epoch, float(trainer.callback_metrics.get("val_loss", math.nan))
        if not math.isfinite(loss):
            msg = (
                f"{self.name} has no finite validation loss in epoch {epoch + 1}: train with a lower learning_rate or "
                "at another precision, in a new output folder."
            )
            raise ValueError(msg)
        if trainer.is_global_zero:
            losses = {**read_curve(self.path).to_dict(), epoch: loss}
            write_atomically(self.path, Series(losses, name="val_loss").rename_axis("epoch").to_csv())
        of_all = "" if self.epochs is None else f" of {self.epochs}"
        left = timedelta(seconds=round(self._seconds_left(epoch, pl_module)))
        trainer.print(f"{self.name}, epoch {epoch + 1}{of_all}: val_loss {loss:.6f}, about {left} left")

    def _seconds_left(self, epoch: int, module: Any) -> float:
        if self.epochs is None:
            return module.seconds_left
        seconds = (time.monotonic() - self._started) / (epoch + 1 - self._first_epoch)
        return seconds * (self.epochs - epoch - 1 + self.to_come)
