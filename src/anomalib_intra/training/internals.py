# SPDX-License-Identifier: Apache-2.0
"""The private parts of Lightning and anomalib that this package needs, each reached here and nowhere else.

An update that moves one of them breaks here, and ``tests/training/test_internals.py`` says which.
"""

from pathlib import Path
from typing import Any

from anomalib.cli.cli import AnomalibCLI
from anomalib.data import AnomalibDataModule
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.tuner.lr_finder import _LRCallback
from torchmetrics import Metric
from torchmetrics.classification import BinaryPrecisionRecallCurve


def training_source(trainer: Trainer) -> Any:
    """What Lightning takes the loader of training steps from.

    Args:
        trainer (Trainer): The trainer.

    Returns:
        Any: Its ``dataloader()`` makes the datamodule's loader; a loader set as its ``instance`` takes that's place.
    """
    return trainer.fit_loop._data_source


def validation_source(trainer: Trainer) -> Any:
    """What Lightning takes the loader of validation images from while it trains, as :func:`training_source`.

    Args:
        trainer (Trainer): The trainer.

    Returns:
        Any: The source; its ``is_defined()`` tells whether there is such a loader.
    """
    return trainer.fit_loop.epoch_loop.val_loop._data_source


def evaluation_source(trainer: Trainer, stage: str) -> Any:
    """What Lightning takes the loader of images to test or to validate on from, as :func:`training_source`.

    Args:
        trainer (Trainer): The trainer.
        stage (str): ``"test"`` or ``"validate"``.

    Returns:
        Any: The source.
    """
    return {"test": trainer.test_loop, "validate": trainer.validate_loop}[stage]._data_source


def set_run_folder(trainer: Trainer, folder: Path) -> None:
    """Move the folder that a run writes to, which has no setter.

    Args:
        trainer (Trainer): The trainer.
        folder (Path): The folder, in place of ``trainer.default_root_dir``.
    """
    trainer._default_root_dir = str(folder)  # type: ignore[attr-defined]


def point_latest_to(run: Path) -> bool:
    """Move the link ``latest``, which anomalib sets when it makes the folder of a run.

    Args:
        run (Path): Folder of the run that it is to point to.

    Returns:
        bool: Whether it was moved; Windows may have none, or allow few.
    """
    latest = run.parent / "latest"
    if not latest.is_symlink() or latest.resolve() == run.resolve():
        return False
    try:
        latest.unlink()
        latest.symlink_to(run, target_is_directory=True)
    except OSError:
        return False
    return True


def resize_as_the_model_does(trainer: Trainer) -> None:
    """Let anomalib's datamodule ask anew how the model resizes; it asks before a checkpoint restores that.

    Args:
        trainer (Trainer): The trainer.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning
    if isinstance(datamodule, AnomalibDataModule):
        datamodule._update_augmentations()


def trainer_of(module: LightningModule) -> Trainer | None:
    """Find the trainer of a model without the error that ``module.trainer`` raises where there is none.

    Args:
        module (LightningModule): The model.

    Returns:
        Trainer | None: Its trainer.
    """
    return module._trainer


def parser_of(cli: AnomalibCLI, command: str) -> ArgumentParser:
    """Find the parser of one of a command line's commands.

    Args:
        cli (AnomalibCLI): The command line.
        command (str): The command, such as ``"fit"``.

    Returns:
        ArgumentParser: Its parser.
    """
    return cli._parser(command)


def is_trial(trainer: Trainer) -> bool:
    """Tell whether Lightning trains on trial, to find a learning rate, and takes all back afterwards.

    Args:
        trainer (Trainer): The trainer.

    Returns:
        bool: Whether it does.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning
    return any(isinstance(callback, _LRCallback) for callback in callbacks)


def forget_update(metric: Metric) -> None:
    """Let a metric forget that it was updated with a batch that had nothing for it, as anomalib's metrics do.

    Args:
        metric (Metric): The metric.
    """
    metric._update_count -= 1


def expect_raw_scores(metric: Metric) -> None:
    """Let a metric take scores as they are: torchmetrics takes those above 1 for logits, and guesses batch by batch.

    Args:
        metric (Metric): Any metric; one that guesses nothing stays as it is.
    """
    for part in metric.modules():
        if isinstance(part, BinaryPrecisionRecallCurve):
            part.normalization = None
