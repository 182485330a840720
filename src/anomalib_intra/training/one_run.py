# SPDX-License-Identifier: Apache-2.0
"""A trainer makes one run, and no run writes into the files of another."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

_NEW_ENGINE = "make a new Engine (or Trainer) for each training"


class OneRun(Callback):
    """Refuses a training whose files would be those of another run.

    A trainer keeps its folder, its checkpoints and how far it has come. Given a second model, it takes this for the
    first one, trained already: without a word, it would train nothing and put the second model's calibration into the
    first one's checkpoint. A trainer that has tested or predicted before it trains stands in the folder of the latest
    run, and would write over its checkpoints.

    A run that was stopped may go on in its own trainer, and from its own checkpoints.
    """

    def __init__(self) -> None:
        self._model: Callable[[], Any] = lambda: None  # weak: a trainer must not keep all that it ever trained
        self._data: Callable[[], Any] = lambda: None
        self._name = "another model"
        self._has_trained = self._has_ended = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out whether this trainer has trained, before a checkpoint says how far its run has come."""
        del pl_module
        if stage == "fit":
            self._has_trained = trainer.current_epoch > 0 or trainer.global_step > 0

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look at a run that goes on from a checkpoint, before the best one so far is copied."""
        del checkpoint
        if trainer.state.fn == "fit":
            self._check(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at any other run."""
        if not trainer.ckpt_path:
            self._check(trainer, pl_module)
        self._name = type(pl_module).__name__
        self._model = weakref.ref(pl_module)
        self._data = _reference(_data_of(trainer))
        self._has_ended = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take down that the training has ended."""
        del trainer, pl_module
        self._has_ended = True

    def _check(self, trainer: Trainer, module: LightningModule) -> None:
        given = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
        folders = [Path(folder).resolve() for folder in given if folder]
        if trainer.ckpt_path and Path(trainer.ckpt_path).resolve().parent in folders:
            return  # this folder's own run goes on
        if self._has_trained:
            self._refuse_second(module, _data_of(trainer))
            return
        engines = (Path(trainer.default_root_dir) / "weights" / "lightning").resolve()
        if engines in folders and any(engines.glob("*.ckpt")):
            msg = (
                f"There are checkpoints of another run in {engines}, where this trainer stands since it tested or "
                f"predicted: {_NEW_ENGINE}."
            )
            raise RuntimeError(msg)

    def _refuse_second(self, module: LightningModule, data: Any) -> None:
        same = self._model() is module and self._data() is data
        if same and not self._has_ended:
            return  # what was stopped goes on
        what = f"has trained {self._name} already, and would write into the files of that run"
        longer = "; to train the same model for longer, give the new one that run's last.ckpt as ckpt_path"
        raise RuntimeError(f"This trainer {what}: {_NEW_ENGINE}{longer if same else ''}.")


def _data_of(trainer: Trainer) -> Any:
    return getattr(trainer, "datamodule", None)


def _reference(something: Any) -> Callable[[], Any]:
    return (lambda: None) if something is None else weakref.ref(something)
