# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that lose nothing: the best epoch's, the last one to resume from, how both are written, which counts."""

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.engine.plugins import AnomalibCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, StochasticWeightAveraging
from lightning.pytorch.callbacks import ModelCheckpoint as LightningCheckpoint

from anomalib_intra.training.agreement import Agreement
from anomalib_intra.training.atomic_file import write_atomically
from anomalib_intra.training.stop_signals import StopSignals

logger = logging.getLogger(__name__)

#: Seconds of training that are lost at most.
_MOST_LOST = 300.0
#: Share of the time that may go into saving at the ends of epochs.
_SHARE_FOR_SAVING = 0.05


class AtomicCheckpointIO(AnomalibCheckpointIO):
    """Writes a checkpoint beside the old one and then puts it in its place, in one step.

    A full disk, a lost connection or a kill while saving leaves the old checkpoint as it was.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint.

        Args:
            checkpoint (dict): What to save.
            path (str | Path): Where; a remote address is left to Lightning.
            storage_options (Any): Not used for files.

        Raises:
            OSError: If it cannot be written.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        _save(Path(path), lambda part: torch.save(checkpoint, part))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Load a checkpoint.

        Args:
            path (str | Path): Where it is.
            map_location (Any): As for torch.
            weights_only (bool | None): Whether it may run no code, as for torch.

        Returns:
            dict: What was saved.

        Raises:
            ValueError: If it is another file, or only a part of a checkpoint, or could run code that it must not.
        """
        content: dict[str, Any] | None = None
        reason = None
        try:
            content = super().load_checkpoint(path, map_location, weights_only)  # type: ignore[arg-type]  # Lightning's
        except Exception as error:  # torch raises many kinds, in words that do not tell
            if not Path(path).is_file():
                raise
            reason = error
        if not isinstance(content, dict) or not {"state_dict", "pytorch-lightning_version"} <= content.keys():
            msg = (
                f"{path} is no checkpoint, or not a whole one, or holds objects that could run code, so it is not "
                "loaded: take a .ckpt file from the folder weights/lightning of a training, and if it is one, copy it "
                "again. Exported models (.pt, .onnx, .xml) are for anomalib's inferencers."
            )
            raise ValueError(msg) from reason
        return content


def _save(target: Path, write: Callable[[Path], object]) -> None:
    try:
        write_atomically(target, write)
    except (OSError, RuntimeError) as error:  # torch wraps what the system says into a RuntimeError
        kept = "the checkpoint that was there before is still whole" if target.is_file() else "nothing was there before"
        msg = (
            f"Could not write the checkpoint {target} ({error}); {kept}. Make room, or make the folder writable, and "
            "go on from last.ckpt in the same folder with ckpt_path (--ckpt_path)."
        )
        raise OSError(msg) from error


class BestCheckpoint(ModelCheckpoint):
    """Keeps the weights of the epoch with the lowest validation loss, as ``model.ckpt``.

    A run that is resumed into a new folder brings the best checkpoint so far along.

    Args:
        dirpath (str | Path | None): Folder for the checkpoint.
    """

    def __init__(self, dirpath: str | Path | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="model",
            monitor="val_loss",
            mode="min",
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        self._trainer: Trainer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember which checkpoint the run is resumed from."""
        super().setup(trainer, pl_module, stage)
        self._trainer = trainer

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best epoch so far over from the run that is resumed."""
        if self._trainer is not None and self._trainer.state.fn != "fit":
            return  # Engine.train gives that run's checkpoint to the test, too: this run has its own best by then
        best = Path(state_dict["best_model_path"])
        if state_dict["best_model_path"] and self._trainer is not None and state_dict["dirpath"] != self.dirpath:
            # Where the folder was moved, the best checkpoint lies beside the one that is resumed from.
            name = f"{self.filename}{self.FILE_EXTENSION}"
            places = [Path(self._trainer.ckpt_path or "").with_name(name)]
            places += [best] if best.name == name else []  # no other file, whatever the checkpoint says
            found = next((place for place in places if place.is_file()), None)
            here = Path(self.dirpath or ".") / name
            if found is None:
                logger.warning(
                    "The best checkpoint so far, %s, is not there any more: the best of the epochs from now on is kept."
                    " To go on with the best so far, put %s beside the checkpoint that is resumed from.",
                    best,
                    name,
                )
                state_dict = {**state_dict, "best_model_path": ""}
            else:
                if self._trainer.is_global_zero and found.resolve() != here.resolve():
                    _save(here, lambda part: shutil.copyfile(found, part))
                self._trainer.strategy.barrier()
                state_dict = {
                    **state_dict,
                    "dirpath": self.dirpath,
                    "best_model_path": str(here),
                    "kth_best_model_path": str(here),
                    "best_k_models": {str(here): state_dict["best_model_score"]},
                    "last_model_path": "",
                }
        super().load_state_dict(state_dict)


class LastCheckpoint(Checkpoint):
    """Saves ``last.ckpt`` to resume from: at the ends of epochs, within long ones, and when told to stop.

    At most five minutes of training are lost. At the ends of short epochs it saves only as often as costs a twentieth
    of the time. Ctrl-C, or a signal to terminate, ends the step, saves and stops; a second one stops at once. Of
    several processes, all stop at the same step, whichever of them was told to.

    Args:
        dirpath (str | Path | None): Folder for the checkpoint. Defaults to ``weights`` in the run's folder.
    """

    def __init__(self, dirpath: str | Path | None = None) -> None:
        self.dirpath = dirpath
        self.path: Path | None = None
        self._saved_step: int | None = None
        self._saved_at = self._saving_took = 0.0
        self._agreement = Agreement()
        self._signals = StopSignals()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out where to save."""
        del pl_module, stage
        dirpath = trainer.strategy.broadcast(str(self.dirpath or Path(trainer.default_root_dir) / "weights"))
        self.path = Path(dirpath) / "last.ckpt"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and let signals end the step instead of breaking into it."""
        del pl_module
        self._saved_at = time.monotonic()
        self._agreement = Agreement()
        self._signals.listen(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Save within a long epoch, or when told to stop."""
        del pl_module, args, kwargs
        # (after the last batch, validation and the end of the epoch follow)
        if self._agreement.is_due(trainer) and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save_or_stop(trainer, time.monotonic() - self._saved_at > _MOST_LOST)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where that is cheap."""
        del pl_module
        self._save_or_stop(trainer, time.monotonic() - self._saved_at >= self._saving_took / _SHARE_FOR_SAVING)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of the run, so that it can be made longer."""
        del pl_module
        if self._saved_step != trainer.global_step:
            self._save(trainer)
        self._signals.leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say how to go on."""
        del pl_module
        self._signals.leave()
        if trainer.state.fn == "fit" and isinstance(exception, KeyboardInterrupt):
            there = self.path is not None and self.path.is_file()
            logger.warning(
                "Training was stopped. %s",
                f"Go on with --ckpt_path {self.path}. Its checkpoints score no images before the training has ended."
                if there
                else "Nothing had been saved yet.",
            )

    def _save_or_stop(self, trainer: Trainer, is_time: bool) -> None:
        save, stop = self._agreement.any_of(trainer, is_time, self._signals.told_to_stop)
        if save or stop:
            self._save(trainer)
        if stop:
            raise KeyboardInterrupt

    def _save(self, trainer: Trainer) -> None:
        started = time.monotonic()
        # All of it, optimizer too; said so, since Lightning would tell at each save what it takes this for.
        trainer.save_checkpoint(self.path, weights_only=False)  # type: ignore[arg-type]  # found out by setup
        self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()
        self._saving_took = self._saved_at - started


def keep_last_and_best(trainer: Trainer, best: bool) -> list[Checkpoint]:
    """Add a checkpoint to resume from to the Engine's own, and on request put that of the best epoch in its place.

    Args:
        trainer (Trainer): The trainer, from whose callbacks the Engine's own is then taken out.
        best (bool): Whether to keep the best epoch, where the Engine keeps the last.

    Returns:
        list[Checkpoint]: The callbacks to add; none where the user brought one that chooses an epoch, or takes the
            place of the Engine's.
    """
    present: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning
    checkpoints = [callback for callback in present if isinstance(callback, Checkpoint)]
    if not checkpoints or any(isinstance(one, LastCheckpoint) or _monitors(one) for one in checkpoints):
        return []
    own = next(filter(_is_engine_default, checkpoints), None)
    if own is None:
        keepers = [one for one in checkpoints if isinstance(one, LightningCheckpoint)]
        if keepers and best and trainer.state.fn == "fit":
            logger.warning(
                "%s keeps the last epoch, not the best, and the last epoch will be tested: give the Engine "
                'callbacks=[ModelCheckpoint(monitor="val_loss")], of anomalib.callbacks.',
                type(keepers[0]).__name__,
            )
        return []
    if not best:
        return [LastCheckpoint(own.dirpath)]
    present.remove(own)
    return [BestCheckpoint(own.dirpath), LastCheckpoint(own.dirpath)]


def keeper_of_the_best(trainer: Trainer) -> Any:
    """Find the checkpoint callback whose best file is the outcome of a run.

    Args:
        trainer (Trainer): The trainer.

    Returns:
        Any: The first that monitors something, or else the Engine's own, or else the first; None where there is none.
    """
    keepers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, Checkpoint)]
    return next(iter([*filter(_monitors, keepers), *filter(_is_engine_default, keepers), *keepers]), None)


def weights_were_averaged(trainer: Trainer) -> bool:
    """Tell whether stochastic weight averaging has put the mean of the last epochs' weights in the place of the last.

    Args:
        trainer (Trainer): The trainer, at the end of training.

    Returns:
        bool: Whether it has; not where training ended before its last epoch.
    """
    averaging = [callback for callback in trainer.callbacks if isinstance(callback, StochasticWeightAveraging)]  # type: ignore[attr-defined]
    return any(
        callback.n_averaged is not None and (trainer.max_epochs == -1 or trainer.current_epoch > callback.swa_end)
        for callback in averaging
    )


def _monitors(checkpoint: Checkpoint) -> bool:
    return getattr(checkpoint, "monitor", None) is not None


def _is_engine_default(checkpoint: Checkpoint) -> TypeGuard[ModelCheckpoint]:
    return type(checkpoint) is ModelCheckpoint and checkpoint.monitor is None and checkpoint.filename == "model"
