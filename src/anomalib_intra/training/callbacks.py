# SPDX-License-Identifier: Apache-2.0
"""What is watched while a model trains, a callback for each."""

import logging
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

logger = logging.getLogger(__name__)

#: Images that an error names.
_NAMED = 3


class FiniteLoss(Callback):
    """Ends a training whose loss is no number any more, before its weights reach a checkpoint.

    On an accelerator, a step's loss is looked at when the next step has been handed over, or before a checkpoint is
    saved.

    Raises:
        FloatingPointError: While training, if a loss is NaN or infinite; says which images it came from.
    """

    def __init__(self) -> None:
        self._unseen: tuple[torch.Tensor, int, torch.Tensor, list[str]] | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at the loss of this step or, on an accelerator, of the one before."""
        del batch_idx
        self._look(trainer, pl_module)
        loader: Any = trainer.train_dataloader
        self._unseen = (outputs["loss"].detach(), trainer.global_step, batch.index, loader.names)
        if outputs["loss"].device.type == "cpu":
            self._look(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Look at the last loss, too: no broken weights are saved."""
        del checkpoint
        self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, module: Any) -> None:
        if self._unseen is None:
            return
        (loss, step, index, all_names), self._unseen = self._unseen, None
        if torch.isfinite(loss):
            return
        names = [all_names[number] for number in index.unique().tolist()]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        saved = [
            path
            for callback in reversed(trainer.checkpoint_callbacks)
            if (path := str(getattr(callback, "path", "") or getattr(callback, "best_model_path", "")))
            and Path(path).is_file()
        ]
        go_on = f"Go on from the last good checkpoint, {saved[0]} (--ckpt_path)," if saved else "Start again"
        msg = (
            f"The loss is {float(loss)} at step {step} (epoch {trainer.current_epoch}); its {len(index)} "
            f"{module.samples_name} come from {', '.join(names[:_NAMED])}{more}. Training has diverged. {go_on} with a "
            "lower learning_rate or with gradient clipping (--trainer.gradient_clip_val 1.0)."
        )
        raise FloatingPointError(msg)


class Throughput(Callback):
    """Logs how many samples a second are trained on; the progress bar has the steps a second.

    The clock starts at the end of an epoch's first step, before which images are read.
    """

    def __init__(self) -> None:
        self._started: float | None = None
        self._samples = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Stop the clock."""
        del trainer, pl_module
        self._started = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the step's samples."""
        del trainer, outputs, batch_idx
        if self._started is None:
            self._started, self._samples = time.monotonic(), 0
            return
        self._samples += len(batch)
        speed = self._samples / (time.monotonic() - self._started)
        pl_module.log(f"{pl_module.samples_name}/s", speed, batch_size=1)


class LossHistory(Callback):
    """Keeps each epoch's losses in the model's ``losses``, and leaves a line in the log for runs without a terminal."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin the epoch's row; a run that goes on from an earlier epoch leaves no losses of another run behind."""
        epoch = trainer.current_epoch
        pl_module.losses = [*(row for row in pl_module.losses if row["epoch"] < epoch), {"epoch": epoch}]

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Keep the validation loss."""
        if trainer.state.fn == "fit" and pl_module.losses and "val_loss" in trainer.callback_metrics:
            pl_module.losses[-1]["val_loss"] = float(trainer.callback_metrics["val_loss"])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Keep the training loss."""
        train_loss = float(trainer.callback_metrics.get("train_loss_epoch", torch.nan))
        val_loss = pl_module.losses[-1].get("val_loss", math.nan)  # of this epoch, if it has been validated
        logger.info("Epoch %d: train_loss %.5f, val_loss %.5f", trainer.current_epoch, train_loss, val_loss)
        pl_module.losses[-1]["train_loss"] = train_loss


def best_epoch(losses: Iterable[Mapping[str, float]]) -> int | None:
    """Find the epoch with the lowest validation loss, the first of several.

    Args:
        losses (Iterable[Mapping]): A row for each epoch, as :class:`LossHistory` keeps them; some were validated.

    Returns:
        int | None: The epoch, from 0 on; None if none was validated.

    Example:
        >>> best_epoch([{"epoch": 0, "val_loss": 0.3}, {"epoch": 1, "val_loss": 0.2}, {"epoch": 2}])
        1
    """
    validated = [row for row in losses if "val_loss" in row]
    return int(min(validated, key=lambda row: row["val_loss"])["epoch"]) if validated else None


class ValidatedEnd(Callback):
    """Lets a run that ends by ``max_steps``, which may be within an epoch, end with a validation."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop as early stopping does."""
        del args, kwargs
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True
