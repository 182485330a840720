# SPDX-License-Identifier: Apache-2.0
"""The choice of an image size as tables (CSV), curves (PNG) and a config to go on with."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from pandas import DataFrame, Series, concat

from anomalib_intra.experiments.select_size.rule import REACH, SIGNIFICANT, averaged, choose

_HEADER = """\
# The config that was given, with the image size that anomalib-intra select-size has chosen: {size} x {size}.
#   anomalib train --config {path}
"""


def selection(curves: Mapping[int, Series]) -> DataFrame:
    """Compare sizes by their best averaged validation loss.

    Args:
        curves (Mapping[int, Series]): Validation losses by epoch, from 0 on, of each size in pixels.

    Returns:
        DataFrame: A row for each size, the smallest first: ``image_size``, ``best_loss`` (averaged over +-5 epochs),
        ``best_epoch`` (the middle one, from 1 on), ``next_is_better_by`` (NaN for the largest) and ``chosen``.

    Example:
        >>> curves = {256: Series([0.02] * 11), 320: Series([0.01] * 11), 512: Series([0.01] * 11)}
        >>> selection(curves).query("chosen")["image_size"].item()
        320
    """
    means = {size: averaged(curves[size]) for size in sorted(curves)}
    table = DataFrame(
        [
            # Epochs are numbered from 0 in order, so the place of the best is its number.
            {"image_size": size, "best_loss": mean.min(), "best_epoch": int(mean.to_numpy().argmin()) + 1}
            for size, mean in means.items()
        ]
    )
    table["next_is_better_by"] = table["best_loss"] - table["best_loss"].shift(-1)
    table["chosen"] = table["image_size"] == choose(dict(zip(table["image_size"], table["best_loss"], strict=True)))
    return table


def write_selection(curves: Mapping[int, Series], settings: dict[str, Any], output: Path) -> DataFrame:
    """Write ``selection.csv``, ``curves.csv``, ``curves.png`` and ``config.yaml``.

    Args:
        curves (Mapping[int, Series]): As for :func:`selection`.
        settings (dict): The given config.
        output (Path): Folder, which exists.

    Returns:
        DataFrame: The :func:`selection`.
    """
    table = selection(curves)
    table.to_csv(output / "selection.csv", index=False)
    long = [
        DataFrame(
            {"image_size": size, "epoch": losses.index + 1, "val_loss": losses, "averaged": averaged(losses)}
        ).reset_index(drop=True)
        for size, losses in sorted(curves.items())
    ]
    concat(long).to_csv(output / "curves.csv", index=False)
    _draw(curves, table).savefig(output / "curves.png", dpi=120)

    size = int(table.loc[table["chosen"], "image_size"].item())
    settings = copy.deepcopy(settings)
    settings["model"]["init_args"]["image_size"] = [size, size]
    path = output / "config.yaml"
    text = _HEADER.format(size=size, path=path) + yaml.safe_dump(settings, sort_keys=False, width=120)
    path.write_text(text, encoding="utf-8")
    return table


def _draw(curves: Mapping[int, Series], table: DataFrame) -> Figure:
    figure = Figure(figsize=(8, 4.5))
    axes = figure.subplots()
    for number, row in enumerate(table.to_dict("records")):
        size, losses, colour = row["image_size"], curves[row["image_size"]], f"C{number}"
        label = f"{size} x {size}: {row['best_loss']:.6f}" + ("  (chosen)" if row["chosen"] else "")
        axes.plot(losses.index + 1, losses, color=colour, alpha=0.3, linewidth=1)
        axes.plot(losses.index + 1, averaged(losses), color=colour, label=label)
        axes.plot(row["best_epoch"], row["best_loss"], "o", color=colour)
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation loss")
    axes.set_title(
        f"Thin: each epoch. Thick: averaged over ±{REACH} epochs, with the best.\n"
        f"The smallest size is chosen that the next one does not beat by {SIGNIFICANT}.",
        fontsize="medium",
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    return figure
