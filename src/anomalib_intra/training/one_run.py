# SPDX-License-Identifier: Apache-2.0
"""A trainer makes one run, and no run writes into the files of another."""

import logging
import weakref
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, LightningModule, Trainer

from anomalib_intra.training.internals import point_latest_to, set_run_folder

logger = logging.getLogger(__name__)

_NEW_ENGINE = "make a new Engine (or Trainer) for each training"


class OneRun(Callback):
    """Refuses a training whose files would be those of another run.

    A trainer keeps its folder, its checkpoints and how far it has come. Given a second model, it takes this for the
    first one, trained already: without a word, it would train nothing and put the second model's calibration into the
    first one's checkpoint. A trainer that has tested or predicted before it trains stands in the folder of the latest
    run, and would write over its checkpoints.

    A run that was stopped may go on in its own trainer, and from its own checkpoints. Pictures and report of another
    model that is tested in this trainer, or in the folder of this run, go to a folder of their own; so do those of each
    prediction.
    """

    def __init__(self) -> None:
        self._model: Callable[[], Any] = lambda: None  # weak: a trainer must not keep all that it ever trained
        self._data: Callable[[], Any] = lambda: None
        self._name = "another model"
        self._has_trained = self._has_ended = False
        self._folder: Path | None = None  # while the trainer writes elsewhere
        self._added: list[Callback] = []
        self._added_by: Callable[[], Any] = lambda: None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out whether this trainer has trained, before a checkpoint says how far its run has come."""
        self.teardown(trainer, pl_module, stage)  # of a test that failed
        if self._added_by() is not pl_module:
            self._take_out(trainer)
        if stage == "fit":
            self._has_trained = trainer.current_epoch > 0 or trainer.global_step > 0

    def take_out_others(self, trainer: Trainer) -> None:
        """Take out what the model before left in the trainer: it would go on to process the outputs of the next one.

        Lightning does so only where they are of the same class.

        Args:
            trainer (Trainer): The trainer, which has not got the callbacks of the next model yet.
        """
        self._take_out(trainer, lambda one: isinstance(one, PreProcessor | PostProcessor | Evaluator))

    def remember(self, module: LightningModule, callbacks: list[Callback]) -> None:
        """Remember what belongs to a model.

        Args:
            module (LightningModule): The model.
            callbacks (list[Callback]): What it gives the trainer, but for what keeps the state of a run.
        """
        self._added, self._added_by = callbacks, weakref.ref(module)

    def _take_out(self, trainer: Trainer, is_others: Callable[[Callback], bool] = lambda _: False) -> None:
        present: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning
        known = {id(one) for one in self._added}
        kept = [one for one in present if id(one) not in known and not is_others(one)]
        trainer.callbacks = kept  # type: ignore[attr-defined]
        self._added = []

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

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the folder of the run to its own model."""
        trained = self._model()
        loaded_from = trainer.ckpt_path or getattr(pl_module, "loaded_from", None)
        if trained is pl_module or _is_in(loaded_from, _folders_of(trainer)):
            return
        # anomalib tests where the latest training was, also a checkpoint that comes from elsewhere.
        if trained is None and not (loaded_from and _holds_a_run(trainer)):
            return
        self._folder = Path(trainer.default_root_dir)
        others = self._folder / "other_models"
        number = len(list(others.iterdir())) if others.is_dir() else 0
        set_run_folder(trainer, Path(trainer.strategy.broadcast(str(others / f"{type(pl_module).__name__}_{number}"))))
        Path(trainer.default_root_dir).mkdir(parents=True, exist_ok=True)
        logger.warning(
            "%s is the folder of another training: pictures and report go to %s; those of the run stay.",
            self._folder,
            trainer.default_root_dir,
        )

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go to a folder of its own: one lot of parts follows the other, and their files often have the same names."""
        del pl_module
        self._folder = Path(trainer.default_root_dir)
        now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        own = _new_folder(self._folder / "predictions", now) if trainer.is_global_zero else self._folder
        set_run_folder(trainer, trainer.strategy.broadcast(own))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no empty folder of a prediction, and no ``latest`` to that of a training, which was refused.

        The report of a prediction makes its folder again if it has something.
        """
        del pl_module, exception
        if self._folder is not None:
            _remove_if_empty(trainer)
        if trainer.state.fn == "fit" and trainer.global_step == 0 and trainer.is_global_zero:
            _point_latest_back(Path(trainer.default_root_dir))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Come back to the folder of the run."""
        del pl_module, stage
        if self._folder is not None:
            _remove_if_empty(trainer)
            set_run_folder(trainer, self._folder)
            self._folder = None

    def _check(self, trainer: Trainer, module: LightningModule) -> None:
        folders = _folders_of(trainer)
        if _is_in(trainer.ckpt_path, folders):
            return  # this folder's own run goes on
        if self._has_trained:
            self._refuse_second(module, _data_of(trainer))
            return
        if _holds_a_run(trainer):
            msg = (
                f"There are checkpoints of another run in {_checkpoints_of(trainer)}, where this trainer stands since "
                f"it tested or predicted: {_NEW_ENGINE}."
            )
            raise RuntimeError(msg)

    def _refuse_second(self, module: LightningModule, data: Any) -> None:
        same = self._model() is module and self._data() is data
        if same and not self._has_ended:
            return  # what was stopped goes on
        what = f"has trained {self._name} already, and would write into the files of that run"
        longer = "; to train the same model for longer, give the new one that run's last.ckpt as ckpt_path"
        raise RuntimeError(f"This trainer {what}: {_NEW_ENGINE}{longer if same else ''}.")


def _new_folder(parent: Path, name: str) -> Path:
    folder, number = parent / name, 1
    with suppress(OSError):  # where nothing can be written, a prediction may have nothing to write
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                folder.mkdir()  # (no other process can take the same one)
                break
            except FileExistsError:
                number += 1
                folder = parent / f"{name}_{number}"
    return folder


def _remove_if_empty(trainer: Trainer) -> None:
    """Remove the folder of a prediction that wrote nothing."""
    folder = Path(trainer.default_root_dir)
    if trainer.state.fn == "predict" and trainer.is_global_zero:
        with suppress(OSError):  # it is not empty
            folder.rmdir()
            folder.parent.rmdir()


def _point_latest_back(refused: Path) -> None:
    """Let ``latest`` be the latest run that has a checkpoint: anomalib moves it before a training is looked at."""
    latest = refused.parent / "latest"
    runs = [path.parents[2] for path in refused.parent.glob("v*/weights/lightning/*.ckpt")]
    last = max(runs, key=lambda run: int(run.name[1:]) if run.name[1:].isdigit() else -1, default=refused)
    if latest.resolve() == refused.resolve() and point_latest_to(last.resolve()):
        logger.warning("Nothing was trained, so %s is %s still.", latest, last.name)


def _folders_of(trainer: Trainer) -> list[Path]:
    given = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    return [Path(folder).resolve() for folder in given if folder]


def _checkpoints_of(trainer: Trainer) -> Path:
    return (Path(trainer.default_root_dir) / "weights" / "lightning").resolve()


def _holds_a_run(trainer: Trainer) -> bool:
    folder = _checkpoints_of(trainer)
    return folder in _folders_of(trainer) and any(folder.glob("*.ckpt"))


def _is_in(checkpoint: Any, folders: list[Path]) -> bool:
    return bool(checkpoint) and Path(checkpoint).resolve().parent in folders


def _data_of(trainer: Trainer) -> Any:
    return getattr(trainer, "datamodule", None)


def _reference(something: Any) -> Callable[[], Any]:
    return (lambda: None) if something is None else weakref.ref(something)
