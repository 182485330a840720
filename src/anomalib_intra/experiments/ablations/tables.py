# SPDX-License-Identifier: Apache-2.0
"""Ablation studies in the layout of the paper's Tables 3 to 6."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pandas import DataFrame, concat

from anomalib_intra.benchmark.job import BenchmarkRun
from anomalib_intra.benchmark.machine import versions
from anomalib_intra.benchmark.tables import by_category, failures, markdown
from anomalib_intra.experiments.ablations.published import STUDIES

_TASKS = {"Det.": "image_AUROC", "Seg.": "pixel_AUROC"}
_HEADING = (
    "# Ablations\n\nWritten by `anomalib-intra ablations`. Image AUROC (Det.) and pixel AUROC (Seg.) in %, mean over "
    "seeds, with the weights of the epoch with the best validation loss. Raw scores and maps at the size of the "
    "resized images; the paper resizes its maps back to the size of the files first."
)


def study_table(rows: DataFrame, study: str) -> DataFrame:
    """Put the rows of a study into the layout of the paper.

    Args:
        rows (DataFrame): Rows of runs that ended well, with ``model``, ``category``, ``seed`` and AUROC in 0 .. 1.
        study (str): Its name. Those of :data:`~anomalib_intra.experiments.ablations.published.STUDIES` get the
            paper's headings and figures, others the names of their models.

    Returns:
        DataFrame: Percentages; a row for each category; columns ``Det. ...``, ``Seg. ...``, then those of the paper.

    Example:
        >>> rows = DataFrame({"model": "InTra", "category": ["screw"], "image_AUROC": 0.9, "pixel_AUROC": 0.8})
        >>> study_table(rows, "depth").to_dict("index")
        {'screw': {'Det. InTra': 90.0, 'Seg. InTra': 80.0}}
    """
    known = STUDIES.get(study)
    headings = known.headings if known else {}
    parts = []
    for task, metric in _TASKS.items():
        table = by_category(rows, metric)
        in_order = [name for name in headings if name in table] + [name for name in table if name not in headings]
        parts.append(table[in_order].rename(columns=headings).add_prefix(f"{task} "))
    if known:
        parts.append(known.published().reindex(parts[0].index).add_suffix(", paper"))
    return concat(parts, axis="columns").rename_axis(None)


def write_ablations(studies: Mapping[str, Sequence[BenchmarkRun]], output: Path) -> DataFrame:
    """Write ``ablations.csv`` and ``ablations.md`` from the runs that have a row.

    Args:
        studies (Mapping[str, Sequence[BenchmarkRun]]): The runs of every study, those without a row among them.
        output (Path): Folder.

    Returns:
        DataFrame: The rows of all runs, those that studies share once in each, with the study as ``ablation``.
    """
    rows = DataFrame(
        [
            {"ablation": name, **row, "image_size": run.config["image_size"]}
            for name, runs in studies.items()
            for run in runs
            if (row := run.row) is not None
        ]
    )
    output.mkdir(parents=True, exist_ok=True)
    rows.to_csv(output / "ablations.csv", index=False)
    sections = [_HEADING, _circumstances(rows), *(_section(name, runs, rows) for name, runs in studies.items())]
    (output / "ablations.md").write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")
    return rows


def _circumstances(rows: DataFrame) -> str:
    done = rows[rows["error"] == ""] if len(rows) else rows
    if not len(done):
        return f"With {versions()}."
    seeds, epochs, devices = (", ".join(map(str, sorted(set(done[name])))) for name in ("seed", "epochs", "device"))
    return f"Seeds: {seeds}. Epochs of training: {epochs}; the paper's: 200. Measured on: {devices}. With {versions()}."


def _section(name: str, runs: Sequence[BenchmarkRun], rows: DataFrame) -> str:
    parts = [f"## {STUDIES[name].title if name in STUDIES else name}"]
    if len(rows):
        of_study = rows[rows["ablation"] == name]
        done, failed = of_study[of_study["error"] == ""], of_study[of_study["error"] != ""]
        if len(done):
            parts.append(markdown(study_table(done, name), digits=1))
        if len(failed):
            parts.append("Failed, and tried again when the command is run again:")
            parts.append(failures(failed))
    missing = [f"- {run}" for run in runs if run.row is None]
    if missing:
        parts.append("Not run yet; the command goes on with them:")
        parts.append("\n".join(missing))
    return "\n\n".join(parts)
