# SPDX-License-Identifier: Apache-2.0
"""The command ``select-size``: a training at every size, and the choice between them."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from pandas import DataFrame

from anomalib_intra.experiments.loss_curve import LossCurve, read_curve
from anomalib_intra.experiments.select_size.rule import averaged
from anomalib_intra.experiments.select_size.selection import write_selection
from anomalib_intra.experiments.train_command import TrainCommand
from anomalib_intra.one_pass.lightning_model import OnePassInTra


def select_size(
    arguments: Sequence[str],
    sizes: Sequence[int] = (256, 320, 512),
    epochs: int = 200,
    output: str | Path = "results/select-size",
) -> DataFrame:
    """Train at several image sizes and choose one by the validation loss, as the paper does (sec. 4.1).

    Each size is trained in a folder of its own, which keeps its losses and its last checkpoint. A selection that was
    stopped goes on with what is missing when it is called again, and one with more sizes or epochs trains only those.
    A model that trains for a time is trained here for the epochs, as with ``--model.minutes=null``; the config that is
    written has its minutes again. No test image is read.

    Args:
        arguments (Sequence[str]): Arguments of ``anomalib train``, such as ``["--config", "configs/intra.yaml"]``.
        sizes (Sequence[int]): Sides of the square images in pixels.
        epochs (int): Epochs of every size, at least 11.
        output (str | Path): Folder for ``selection.csv`` (the choice), ``curves.csv``, ``curves.png``, ``config.yaml``
            (the given config with the chosen size) and the trainings.

    Returns:
        DataFrame: A row for each size, as :func:`~anomalib_intra.experiments.select_size.selection.selection` makes it.

    Raises:
        ValueError: If arguments, sizes, epochs or an earlier selection in the folder do not fit (nothing is run then),
            or if a training did not give a finite validation loss for every epoch.
        FloatingPointError: If a training has diverged.
        KeyboardInterrupt: If it was stopped.

    Example:
        >>> table = select_size(["--config", "configs/intra.yaml"])  # doctest: +SKIP
    """
    output, sizes = Path(output), sorted(set(sizes))
    command = TrainCommand(arguments)
    _check(command, arguments, sizes, epochs)
    command.claim(output)

    folders = {size: output / f"{size}x{size}" for size in sizes}
    missing = {size: max(0, epochs - len(read_curve(folders[size] / "losses.csv"))) for size in sizes}
    for number, size in enumerate(sizes, start=1):
        folder, path = folders[size], folders[size] / "losses.csv"
        if not missing.pop(size):
            continue
        if not (folder / "last.ckpt").is_file():
            shutil.rmtree(folder, ignore_errors=True)  # a first epoch that was cut off
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{size} x {size} ({number} of {len(sizes)})"
        training = _training(command, arguments, size)
        training.run(folder, epochs, LossCurve(path, name, epochs, to_come=sum(missing.values())))
        if len(read_curve(path)) < epochs:
            msg = f"The training at {name} ended before its {epochs} epochs: look for what limits it in the trainer."
            raise ValueError(msg)
    curves = {size: read_curve(folders[size] / "losses.csv").head(epochs) for size in sizes}
    return write_selection(curves, command.settings, output)


def _training(command: TrainCommand, arguments: Sequence[str], size: int) -> TrainCommand:
    by_epochs = ["--model.minutes=null"] if isinstance(command.model, OnePassInTra) else []
    return TrainCommand([*arguments, *by_epochs, f"--model.image_size=[{size},{size}]"])


def _check(command: TrainCommand, arguments: Sequence[str], sizes: Sequence[int], epochs: int) -> None:
    if not sizes:
        raise ValueError("There are no image sizes to choose from: give one or more.")
    for size in sizes:
        with torch.device("meta"):  # refuses a size that does not work, without drawing weights
            _training(command, arguments, size)
    averaged(DataFrame({"val_loss": 0.0}, index=range(epochs))["val_loss"])  # refuses too few epochs
