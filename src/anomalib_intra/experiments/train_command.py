# SPDX-License-Identifier: Apache-2.0
"""Training with the arguments of anomalib's own command line, in a folder of our own."""

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
from anomalib.utils.config import flatten_dict
from jsonargparse import ArgumentParser
from lightning import seed_everything
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import SaveConfigCallback

from anomalib_intra.experiments.loss_curve import LossCurve
from anomalib_intra.intra.lightning_model import InTra
from anomalib_intra.one_pass.lightning_model import OnePassInTra
from anomalib_intra.training.internals import parser_of


class TrainCommand(AnomalibCLI):
    """The arguments of ``anomalib train``, with the model and the datamodule that they ask for.

    Args:
        arguments (Sequence[str]): Arguments, such as ``["--config", "configs/intra.yaml"]``.

    Attributes:
        settings (dict): All of them as plain data, in the layout of a config.
        model (InTra | OnePassInTra): The model.
        datamodule (AnomalibDataModule): The datamodule.

    Raises:
        ValueError: If they cannot be used: there is no such model, no data, or no such argument.

    Example:
        >>> command = TrainCommand(["--model", "InTra", "--model.depth", "1", "--data", "anomalib_intra.MVTec"])
        >>> command.settings["model"]["class_path"]
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
        self.settings = yaml.safe_load(parser_of(self, "fit").dump(self.config["fit"], skip_default=True))
        # An argument that is None is left out, and with it the user's word: minutes=None is not the default.
        given = self.config["fit"]["model"]["init_args"]
        nothing = {name: None for name, value in given.items(nested=False) if value is None}
        self.settings["model"].setdefault("init_args", {}).update(nothing)
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
        if not (isinstance(kind, type) and issubclass(kind, InTra | OnePassInTra)):
            name = self.config["fit"]["model"]["class_path"]
            msg = f"This command trains an InTra or a OnePassInTra; the config has {name}."
            raise ValueError(msg)
        seed = self.config["fit"]["seed_everything"]
        if seed is not False:
            seed_everything(None if seed is True else seed, workers=True, verbose=False)

    def instantiate_engine(self) -> None:
        """Leave that to :meth:`run`."""

    def claim(self, output: Path) -> None:
        """Keep the settings in a folder beside what is trained with them.

        Args:
            output (Path): The folder.

        Raises:
            ValueError: If something was trained there with other settings.
        """
        path = output / "given.yaml"
        if path.is_file():
            before, now = (flatten_dict(x) for x in (yaml.safe_load(path.read_text(encoding="utf-8")), self.settings))
            differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
            if differing:
                msg = (
                    f"{output} holds what was trained with another {', '.join(differing)}: give another output "
                    "folder, or delete it to start anew."
                )
                raise ValueError(msg)
        output.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(self.settings, sort_keys=False, width=120), encoding="utf-8")

    def make_engine(self, folder: Path, callbacks: Sequence[Callback], **trainer: Any) -> Engine:
        """Make an engine with the trainer arguments that were given, but for those given here.

        Args:
            folder (Path): Folder for what the engine writes.
            callbacks (Sequence[Callback]): Callbacks beside those given, whose own checkpoints are left out.
            **trainer (Any): Trainer arguments in the place of those given.

        Returns:
            Engine: The engine.
        """
        arguments = dict(self.config_init["fit"]["trainer"])
        given = arguments.pop("callbacks") or []
        given = given if isinstance(given, list) else [given]
        # Carries the command line to the model, which looks for its seed, optimizer and schedule there.
        parser: Any = parser_of(self, "fit")
        commanded = SaveConfigCallback(parser, self.config["fit"], overwrite=True)
        kept = [one for one in given if not isinstance(one, Checkpoint)]
        return Engine(
            **{**arguments, "default_root_dir": folder, "callbacks": [*kept, commanded, *callbacks], **trainer}
        )

    def run(self, folder: Path, epochs: int, curve: LossCurve) -> None:
        """Train for the sake of the losses, from the last checkpoint in the folder on. No test image is read.

        Args:
            folder (Path): Folder for ``last.ckpt`` and what else the training writes.
            epochs (int): Epochs; early stopping does not end them.
            curve (LossCurve): Keeps the losses.

        Raises:
            KeyboardInterrupt: If it was stopped.
        """
        every_epoch = ModelCheckpoint(dirpath=folder, filename="last", enable_version_counter=False)
        engine = self.make_engine(
            folder,
            [curve, every_epoch],
            # Lightning lets nothing stop a training before min_epochs.
            min_epochs=epochs,
            max_epochs=epochs,
            max_steps=-1,
            max_time=None,
            check_val_every_n_epoch=1,
            val_check_interval=1.0,
            enable_checkpointing=True,
        )
        # Only the losses count here; and where validation images are test images, thresholds would be set on them.
        self.model.learn_normal = self.model.set_thresholds = lambda _: None
        last = folder / "last.ckpt"
        self.train(engine, last if last.is_file() else None)

    def train(self, engine: Engine, checkpoint: Path | None) -> None:
        """Train.

        Args:
            engine (Engine): Engine of :meth:`make_engine`.
            checkpoint (Path | None): Checkpoint to go on from.

        Raises:
            KeyboardInterrupt: If it was stopped.
        """
        try:
            engine.fit(self.model, datamodule=self.datamodule, ckpt_path=checkpoint)
        except SystemExit as stop:  # what Lightning makes of Ctrl-C, which it also switches off
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from stop
