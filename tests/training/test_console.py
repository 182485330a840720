# SPDX-License-Identifier: Apache-2.0
"""The console of a training: a line for each epoch, each line once, and what others print."""

import io
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from anomalib.loggers import configure_logger
from lightning.pytorch.callbacks import RichProgressBar

from anomalib_intra import TextureDemo
from anomalib_intra.training.console import WholeLines, print_each_line_once

from ..conftest import TINY, tiny_engine, tiny_intra


@pytest.fixture
def own_handlers() -> Iterator[None]:
    """Let a test change the handlers that are for all."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("lightning")]
    loggers = [logging.getLogger(), *map(logging.getLogger, names)]
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers.clear()
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


def test_each_line_is_printed_once_and_files_are_still_written(own_handlers: None, tmp_path: Path, capsys) -> None:
    logging.getLogger().addHandler(logging.StreamHandler())  # what basicConfig does where there is no handler yet
    logging.getLogger().addHandler(logging.FileHandler(tmp_path / "log.txt"))
    configure_logger()
    print_each_line_once()
    logging.getLogger("anything").warning("heard")
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("heard") == 1
    assert (tmp_path / "log.txt").read_text().count("heard") == 1


def test_without_anomalibs_command_line_nothing_is_changed(own_handlers: None, capsys) -> None:
    logging.getLogger().addHandler(logging.StreamHandler())
    print_each_line_once()
    logging.getLogger("anything").warning("heard")
    assert capsys.readouterr().err.count("heard") == 1


def test_a_line_is_printed_whole_with_what_is_more_than_news(own_handlers: None, capsys) -> None:
    configure_logger()
    logging.getLogger().setLevel(logging.INFO)
    print_each_line_once()
    path = "results/[InTra]/" + "a_long_name/" * 20
    logging.getLogger("anything").info("Written to %s", path)
    logging.getLogger("anything").warning("The disk is full")
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d Written to " + re.escape(path), first)
    assert second.endswith(" WARNING The disk is full")


def test_lightnings_lines_are_printed_once_without_its_advertisements(own_handlers: None, capsys) -> None:
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(logging.StreamHandler())  # what Lightning does, whose lines break the progress bar
    logger.propagate = False
    configure_logger()
    print_each_line_once()
    logger.warning("`Trainer.fit` stopped")
    logger.warning("💡 Tip: try installing something")
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("stopped") == 1
    assert "Tip" not in printed.out + printed.err


def test_a_message_that_cannot_be_written_does_not_end_a_run(capsys) -> None:
    WholeLines().handle(logging.makeLogRecord({"msg": "%d epochs", "args": "three"}))
    assert "Logging error" in capsys.readouterr().err


_COMMAND = """
import sys, warnings
from lightning.pytorch import Callback
import {module} as module
class Warns(Callback):
    def on_train_epoch_end(self, *_):
        warnings.warn("a warning of the user's")
module.Warns = Warns
sys.modules["users"] = module
module.main()
"""


@pytest.mark.parametrize("module", ["anomalib.cli.cli", "anomalib_intra.cli"])
def test_a_command_prints_a_line_for_each_epoch(module: str, demo_root: Path, tmp_path: Path) -> None:
    model = {**TINY, "image_size": list(TINY["image_size"])}
    words = [
        *("train", "--model=anomalib_intra.InTra", "--data=TextureDemo", f"--data.root={demo_root}"),
        *(f"--model.{name}={value}" for name, value in model.items()),
        *("--model.visualizer=false", "--data.num_workers=0", f"--default_root_dir={tmp_path}"),
        *("--trainer.max_epochs=2", "--trainer.limit_train_batches=2", "--trainer.accelerator=cpu"),
        *("--trainer.enable_progress_bar=false", "--trainer.callbacks+=users.Warns"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", _COMMAND.format(module=module), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout + done.stderr
    for line in ("Epoch 0: train_loss", "Epoch 1: train_loss", "Back to the weights of"):
        assert printed.count(line) == 1, line
    assert "was not set" not in printed
    if module == "anomalib_intra.cli":
        for nothing_to_mend in ("FutureWarning", "LeafSpec", "on_after_batch_transfer", "litlogger"):
            assert nothing_to_mend not in printed
    assert "a warning of the user's" in printed


def test_the_progress_bar_fits_into_a_line_of_100_columns(demo_root: Path, tmp_path: Path) -> None:
    out = io.StringIO()

    class Bar(RichProgressBar):
        def _init_progress(self, trainer: object) -> None:
            self._console_kwargs = {"file": out, "width": 100, "force_terminal": True, "color_system": None}
            super()._init_progress(trainer)

    engine = tiny_engine(
        tmp_path, max_epochs=2, limit_train_batches=2, callbacks=[Bar()], enable_progress_bar=True, logger=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.fit(tiny_intra(visualizer=False), datamodule=TextureDemo(demo_root, num_workers=0))
    lines = out.getvalue().splitlines()
    assert any("val_loss" in line and "loss:" in line and "Epoch" in line for line in lines)
    # What does not fit is wrapped into lines of its own.
    assert not any("loss" in line and "Epoch" not in line for line in lines)
