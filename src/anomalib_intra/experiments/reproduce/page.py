# SPDX-License-Identifier: Apache-2.0
"""The page of a reproduced category: its figures beside the yardsticks and the paper's, and how they came about."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from pandas import DataFrame

from anomalib_intra.benchmark.machine import versions
from anomalib_intra.benchmark.published import published
from anomalib_intra.benchmark.tables import markdown
from anomalib_intra.report.plots import training_curves
from anomalib_intra.training.callbacks import best_epoch

_COLUMNS = {
    "image_AUROC": "image AUROC",
    "pixel_AUROC": "pixel AUROC",
    "pixel_AUPRO": "AUPRO",
    "good_PSNR": "PSNR of good images (dB)",
}


def write_page(result: dict[str, Any], losses: Sequence[dict[str, float]], folder: Path) -> Path:
    """Write ``result.md`` and ``losses.png``.

    Args:
        result (dict): What :func:`~anomalib_intra.experiments.reproduce.reproduce` found.
        losses (Sequence[dict]): Losses of every epoch, as in the model's ``losses``.
        folder (Path): Folder.

    Returns:
        Path: The page.
    """
    curves = training_curves(losses)
    if curves is not None:
        curves.savefig(folder / "losses.png", dpi=120)
    init = result["settings"]["model"].get("init_args", {})
    text = f"""# {result["category"]}

{_extent(result)}

{markdown(figures(result), digits=[3, 3, 3, 1])}

- {result["parameters"] / 1e6:.2f} million parameters, seed {result["settings"]["seed_everything"]}, precision \
{result["settings"].get("trainer", {}).get("precision") or "32-true"}.
- {_time(result["sessions"])}
- Weights of epoch {best_epoch(losses)}, the one with the lowest validation loss. No test image was seen before the \
test.
- With {versions()}.

![Training and validation loss](losses.png)

Arguments of the model:

```yaml
{yaml.safe_dump({key: value for key, value in init.items() if not isinstance(value, dict)}, sort_keys=False).strip()}
```
"""
    (folder / "result.md").write_text(text, encoding="utf-8")
    return folder / "result.md"


def figures(result: dict[str, Any]) -> DataFrame:
    """Set the figures of a run beside those of the yardsticks and the paper.

    Args:
        result (dict): What :func:`~anomalib_intra.experiments.reproduce.reproduce` found.

    Returns:
        DataFrame: A row for each; image and pixel AUROC and AUPRO in 0 .. 1, PSNR in dB; NaN where there is none.
    """
    rows = {"this run": result["metrics"], **result["yardsticks"]}
    paper = {metric: published(metric)["InTra"] for metric in ("image_AUROC", "pixel_AUROC")}
    if result["category"] in paper["image_AUROC"]:
        rows["the paper"] = {metric: column[result["category"]] / 100 for metric, column in paper.items()}
    table = DataFrame.from_dict(rows, orient="index").reindex(columns=list(_COLUMNS))
    return table.astype(float).rename(columns=_COLUMNS)


def _extent(result: dict[str, Any]) -> str:
    of_intra = "windows" in result
    samples = f"{result['windows']:,} windows" if of_intra else f"{result['images']:,} images"
    trained = f"Trained for {result['epochs']} epochs, {samples}"
    if not of_intra and result["minutes"] is None:
        return f"{trained}."
    end = "the validation loss had stopped improving" if of_intra else f"its {result['minutes']:g} minutes were over"
    return (
        f"{trained}, until {end}."
        if result["ended_by_itself"]
        else f"{trained}; **not until {end}**: more may do better."
    )


def _time(sessions: Sequence[dict[str, Any]]) -> str:
    total = timedelta(seconds=round(sum(one["seconds"] for one in sessions)))
    devices = " and ".join(dict.fromkeys(one["device"] for one in sessions))
    return f"Training and validation took {total} in {len(sessions)} session{'s' * (len(sessions) > 1)} on {devices}."
