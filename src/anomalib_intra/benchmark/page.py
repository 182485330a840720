# SPDX-License-Identifier: Apache-2.0
"""The page of a benchmark (Markdown), with its rows (CSV) and charts (PNG) beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pandas import DataFrame, Series

from anomalib_intra.benchmark.charts import chart_of_categories, chart_of_time
from anomalib_intra.benchmark.evaluation import METRICS
from anomalib_intra.benchmark.machine import versions
from anomalib_intra.benchmark.tables import comparison, failures, markdown, published_means, summary

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
_SUMMARY = "Means over the categories; a model that lacks one has no mean here. Times are of one category.\n\n"
_COST_HEADING = (
    "## Cost\n\nMean over the runs of a model. Milliseconds are at the run's own precision, from a resized image to "
    "score and map. Peak memory is that of the whole run, computing the metrics included. Baselines have no training; "
    "their means are computed in the test.\n\n"
)


def write_page(rows: DataFrame, config: dict[str, Any], output: Path, missing: Sequence[str] = ()) -> Path:
    """Write ``benchmark.csv``, ``benchmark.md`` and its charts, ``benchmark.png`` and ``categories.png``.

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
    sections = ["# Benchmark", *filter(None, [config.get("notes", "").strip()])]
    if len(done):
        chart_of_time(done).savefig(output / "benchmark.png", dpi=120)
        if len(devices := _devices(done)) > 1:
            sections.append(f"Rows are of {len(devices)} devices ({'; '.join(devices)}): do not compare their times.")
        sections.append(_SUMMARY + markdown(summary(done), digits=1))
        sections.append("![Mean AUROC of every model against its training time](benchmark.png)")
    sections.append(_how(rows, config))
    if len(done):
        chart_of_categories(done).savefig(output / "categories.png", dpi=120)
        sections.append("![Image and pixel AUROC of every model and category](categories.png)")
        sections += [_section(done, metric) for metric in METRICS if done[metric].notna().any()]
        sections.append(_COST_HEADING + markdown(_costs(done), digits=1))
    if len(failed):
        sections.append("## Failed runs\n\nThey are tried again when the command is run again.\n\n" + failures(failed))
    if missing:
        listing = "\n".join(f"- {run}" for run in missing)
        sections.append("## Missing runs\n\nThe command goes on with them when it is run again.\n\n" + listing)
    config = {key: value for key, value in config.items() if key != "notes"}
    sections.append("## Config\n\n```yaml\n" + yaml.safe_dump(config, sort_keys=False, width=120) + "```")
    page = output / "benchmark.md"
    page.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return page


def _how(rows: DataFrame, config: dict[str, Any]) -> str:
    sizes = config["benchmark"].get("image_size", [256, 256])
    if isinstance(sizes, dict):
        reduced = ", ".join(f"{height} x {width} ({name})" for name, (height, width) in sizes.items()) + " pixels"
    else:
        reduced = f"{sizes[0]} x {sizes[1]} pixels"
    used = ", ".join(_devices(rows)) or "nothing yet"
    return (
        "## How it was measured\n\n"
        "Written by `anomalib-intra benchmark --config CONFIG`, with the config at the end of this page. "
        f"Every model saw the same training, held-out and test images, reduced to {reduced}, and "
        "was scored at that size on raw scores: normalization, which clamps scores and so moves AUROC, is off for all. "
        f"Seeds: {', '.join(map(str, sorted(set(rows['seed']))))}. Measured on: {used}. With {versions()}."
    )


def _devices(rows: DataFrame) -> list[str]:
    return sorted(set(rows.get("device", Series(dtype=str)).dropna()))


def _section(rows: DataFrame, metric: str) -> str:
    text = f"## {_TITLES[metric]}\n\n" + markdown(comparison(rows, metric), digits=1)
    if metric in ("image_AUROC", "pixel_AUROC"):
        text += "\n\nAs printed, for all 15 categories of MVTec AD:\n\n" + markdown(published_means(metric), digits=2)
    return text


def _costs(rows: DataFrame) -> DataFrame:
    costs = rows.groupby("model", sort=False)[list(_COSTS)].mean()
    costs["parameters"] /= 1e6
    return costs.rename(columns=_COSTS)
