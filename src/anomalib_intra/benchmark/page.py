# SPDX-License-Identifier: Apache-2.0
"""The page of a benchmark (Markdown), with its rows (CSV) and a bar chart (PNG) beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from pandas import DataFrame, Series

from anomalib_intra.benchmark.evaluation import METRICS
from anomalib_intra.benchmark.machine import versions
from anomalib_intra.benchmark.tables import comparison, markdown, published_means

_TITLES = {
    "image_AUROC": "Detection: image AUROC in %, the paper's Table 1 beside it",
    "pixel_AUROC": "Segmentation: pixel AUROC in %, the paper's Table 2 beside it",
    "pixel_AUPRO": "Segmentation: AUPRO up to 30 % false positives, in %",
    "image_F1Max": "Detection: best F1 over all thresholds, in %",
    "pixel_F1Max": "Segmentation: best F1 over all thresholds, in %",
}
_COSTS = {
    "parameters": "parameters (million)",
    "epochs": "epochs",
    "steps": "steps",
    "fit_s": "training (s)",
    "ms_per_image": "ms per image",
    "peak_memory_mib": "peak memory (MiB)",
}
_COST_HEADING = (
    "## Cost\n\nMean over the runs of a model. Milliseconds are at the run's own precision, from a resized image to "
    "score and map. Peak memory is that of the whole run, computing the metrics included. Yardsticks have no training; "
    "their means are computed in the test.\n\n"
)


def write_page(rows: DataFrame, config: dict[str, Any], output: Path, missing: Sequence[str] = ()) -> Path:
    """Write ``benchmark.csv``, ``benchmark.png`` and ``benchmark.md``.

    Args:
        rows (DataFrame): Rows of runs, failed ones among them.
        config (dict): The config of the benchmark, which the page repeats; ``notes`` is text for its beginning.
        output (Path): Folder.
        missing (Sequence[str]): Runs of the config that have no row yet.

    Returns:
        Path: The page.
    """
    output.mkdir(parents=True, exist_ok=True)
    rows.to_csv(output / "benchmark.csv", index=False)
    done, failed = rows[rows["error"] == ""], rows[rows["error"] != ""]
    sections = [_heading(rows, config), *filter(None, [config.get("notes", "").strip()])]
    if len(done):
        chart(done).savefig(output / "benchmark.png", dpi=120)
        sections.append("![Image and pixel AUROC of every model and category](benchmark.png)")
        sections += [_section(done, metric) for metric in METRICS if done[metric].notna().any()]
        sections.append(_COST_HEADING + markdown(_costs(done), digits=1))
    if len(failed):
        listing = failed[["model", "category", "seed", "error"]].to_markdown(index=False)
        sections.append("## Failed runs\n\nThey are tried again when the command is run again.\n\n" + listing)
    if missing:
        listing = "\n".join(f"- {run}" for run in missing)
        sections.append("## Missing runs\n\nThe command goes on with them when it is run again.\n\n" + listing)
    config = {key: value for key, value in config.items() if key != "notes"}
    sections.append("## Config\n\n```yaml\n" + yaml.safe_dump(config, sort_keys=False, width=120) + "```")
    page = output / "benchmark.md"
    page.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return page


def chart(rows: DataFrame) -> Figure:
    """Draw image and pixel AUROC of every model and category.

    Args:
        rows (DataFrame): Rows of runs that ended well.

    Returns:
        Figure: Two bar charts; the paper's InTra is marked where it has the category.

    Example:
        >>> rows = DataFrame({"model": "A", "category": ["grid"], "seed": 1, "image_AUROC": 0.9, "pixel_AUROC": 0.8})
        >>> len(chart(rows).axes)
        2
    """
    figure = Figure(figsize=(max(7.0, 1.2 + 0.35 * rows["category"].nunique() * (rows["model"].nunique() + 1)), 7))
    models = list(dict.fromkeys(rows["model"]))
    for axes, metric in zip(figure.subplots(2, 1, sharex=True), ("image_AUROC", "pixel_AUROC"), strict=True):
        table = comparison(rows, metric)
        table[models].plot.bar(ax=axes, rot=30, width=0.8, legend=False)
        paper = table["InTra, paper"].to_numpy()
        axes.plot(range(len(table)), paper, "k_", markersize=14, label="InTra in the paper")
        axes.set_ylim(max(0, min(table[models].min().min(), 90) - 5), 100.5)
        axes.set_ylabel(f"{metric.replace('_', ' ')} (%)")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    figure.axes[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(models) + 1, frameon=False)
    for label in figure.axes[1].get_xticklabels():
        label.set_horizontalalignment("right")
    figure.tight_layout()
    return figure


def _heading(rows: DataFrame, config: dict[str, Any]) -> str:
    sizes = config["benchmark"].get("image_size", [256, 256])
    if isinstance(sizes, dict):
        reduced = ", ".join(f"{height} x {width} ({name})" for name, (height, width) in sizes.items()) + " pixels"
    else:
        reduced = f"{sizes[0]} x {sizes[1]} pixels"
    seen = rows.drop_duplicates("model").set_index("model")["pretrained"]
    used = ", ".join(sorted(set(rows.get("device", Series(dtype=str)).dropna()))) or "nothing yet"
    return (
        "# Benchmark\n\n"
        "Written by `anomalib-intra benchmark --config CONFIG`, with the config at the end of this page. "
        f"Every model saw the same training, held-out and test images, reduced to {reduced}, and "
        "was scored at that size on raw scores: normalization, which clamps scores and so moves AUROC, is off for all. "
        f"Seeds: {', '.join(map(str, sorted(set(rows['seed']))))}. Measured on: {used}. With {versions()}.\n\n"
        + DataFrame({"beside the training images, the model saw": seen}).to_markdown()
    )


def _section(rows: DataFrame, metric: str) -> str:
    text = f"## {_TITLES[metric]}\n\n" + markdown(comparison(rows, metric), digits=1)
    if metric in ("image_AUROC", "pixel_AUROC"):
        text += "\n\nAs printed, for all 15 categories of MVTec AD:\n\n" + markdown(published_means(metric), digits=2)
    return text


def _costs(rows: DataFrame) -> DataFrame:
    costs = rows.groupby("model", sort=False)[list(_COSTS)].mean()
    costs["parameters"] /= 1e6
    return costs.rename(columns=_COSTS)
