# SPDX-License-Identifier: Apache-2.0
"""Training at one image size, with the arguments of anomalib's own command line."""

import signal
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from pydoc import locate
from typing import Any

import yaml
from anomalib.callbacks import ModelCheckpoint
from anomalib.cli.cli import AnomalibCLI
from anomalib.engine import Engine
from jsonargparse import ArgumentParser
from lightning import seed_everything
from lightning.pytorch.callbacks import Checkpoint

from anomalib_intra.lightning_model import InTra
from anomalib_intra.select_size.curve import LossCurve


class Fit(AnomalibCLI):
    """The arguments of ``anomalib train``, with the model and the datamodule that they ask for.

    Args:
        arguments (Sequence[str]): Arguments, such as ``["--config", "configs/intra.yaml"]``.

    Attributes:
        settings (dict): All of them as plain data, in the layout of a config.
        model (InTra): The model.
        datamodule (AnomalibDataModule): The datamodule.

    Raises:
        ValueError: If they cannot be used: there is no InTra, no data, or no such argument.

    Example:
        >>> fit = Fit(["--model", "InTra", "--model.depth", "1", "--data", "anomalib_intra.MVTec"])
        >>> fit.settings["model"]["class_path"]
        'anomalib_intra.InTra'
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        try:
            super().__init__(["fit", *arguments], run=False)
        except ArgumentError as error:
            reason = str(error).replace("'fit.", "'")
            msg = f"These are no arguments for anomalib train, whose config needs a model and data: {reason}"
            raise ValueError(msg) from error
        if self.datamodule is None:
            raise ValueError("The config has no data to train on: add a datamodule with its class_path.")
        self.settings = yaml.safe_load(self._parser("fit").dump(self.config["fit"], skip_default=True))
        # A seed of 1 equals the default, which is True, and would be left out.
        self.settings["seed_everything"] = self.config["fit"]["seed_everything"]

    @staticmethod
    def init_parser(**kwargs: Any) -> ArgumentParser:
        """Let mistakes be raised, not printed below the usage of another command."""
        return AnomalibCLI.init_parser(exit_on_error=False, **kwargs)

    def before_instantiate_classes(self) -> None:
        """Refuse other models, and seed everything before the model draws its weights, which anomalib leaves out."""
        super().before_instantiate_classes()
        kind = locate(self.config["fit"]["model"]["class_path"])
        if not (isinstance(kind, type) and issubclass(kind, InTra)):
            name = self.config["fit"]["model"]["class_path"]
            msg = f"The image size is chosen for InTra, by its validation loss; the config has {name}."
            raise ValueError(msg)
        seed = self.config["fit"]["seed_everything"]
        if seed is not False:
            seed_everything(None if seed is True else seed, workers=True, verbose=False)

    def instantiate_engine(self) -> None:
        """Leave that to :meth:`run`."""

    def run(self, folder: Path, epochs: int, curve: LossCurve) -> None:
        """Train, from the last checkpoint in the folder on if there is one. No test image is read.

        Args:
            folder (Path): Folder for ``last.ckpt`` and what else the training writes.
            epochs (int): Epochs; early stopping does not end them.
            curve (LossCurve): Keeps the losses.

        Raises:
            KeyboardInterrupt: If it was stopped.
        """
        trainer = dict(self.config_init["fit"]["trainer"])
        callbacks = trainer.pop("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        every_epoch = ModelCheckpoint(dirpath=folder, filename="last", enable_version_counter=False)
        engine = Engine(
            **{
                **trainer,
                "default_root_dir": folder,
                "callbacks": [*(one for one in callbacks if not isinstance(one, Checkpoint)), curve, every_epoch],
                # Lightning lets nothing stop a training before min_epochs.
                "min_epochs": epochs,
                "max_epochs": epochs,
                "max_steps": -1,
                "max_time": None,
                "check_val_every_n_epoch": 1,
                "val_check_interval": 1.0,
                "enable_checkpointing": True,
            }
        )
        # Only the losses count here; and where validation images are test images, thresholds would be set on them.
        self.model.calibrate = lambda _: None
        last = folder / "last.ckpt"
        try:
            engine.fit(self.model, datamodule=self.datamodule, ckpt_path=last if last.is_file() else None)
        except SystemExit as stop:  # what Lightning makes of Ctrl-C, which it also switches off
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from stop
