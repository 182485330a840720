# SPDX-License-Identifier: Apache-2.0
"""The pages of a report: each one HTML file that needs nothing from elsewhere."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from pandas import DataFrame
from PIL import Image

from anomalib_intra.report.panels import Thumbnail
from anomalib_intra.report.plots import as_svg, score_histogram, training_curves
from anomalib_intra.report.record import PredictionRecord, TestRecord, path_below

#: Metrics in words; others are shown by their names.
_IN_WORDS = {
    "image_AUROC": ("Image AUROC", "how often an anomalous image scores above a normal one"),
    "image_F1Score": ("Image F1", "of the decisions about images"),
    "image_F1Max": ("Image F1, best", "over all thresholds"),
    "pixel_AUROC": ("Pixel AUROC", "how often an anomalous pixel scores above a normal one"),
    "pixel_F1Score": ("Pixel F1", "of the decisions about pixels"),
    "pixel_F1Max": ("Pixel F1, best", "over all thresholds"),
    "pixel_AUPRO": ("AUPRO", "overlap with every single defect, large or small"),
    "good_PSNR": ("PSNR of normal images, dB", "how well they are reconstructed"),
}


def render(
    record: TestRecord,
    title: str,
    date: datetime,
    threshold: float | None,
    metrics: Mapping[str, float],
    losses: Sequence[dict[str, float]],
    settings: Mapping[str, Any],
    checkpoint: str | None = None,
) -> str:
    """Write the page of a test.

    Args:
        record (TestRecord): The images of the test.
        title (str): Model and data.
        date (datetime): When the test ended.
        threshold (float | None): Score above which an image is called anomalous, None where nothing is decided.
        metrics (Mapping[str, float]): Figures of the test.
        losses (Sequence[dict]): Rows of the training curves; may be empty.
        settings (Mapping[str, Any]): The model's arguments.
        checkpoint (str | None): File that the weights come from, where they come from one.

    Returns:
        str: HTML.

    Example:
        >>> page = render(TestRecord(), "InTra", datetime(2025, 1, 1), None, {"image_AUROC": 0.9}, [], {"depth": 13})
        >>> "Image AUROC" in page and "http" not in page
        True
    """
    images = record.frame()
    counts = _counts(images)
    return _fill(
        "page.html",
        title=title,
        date=date,
        folder=record.folder,
        checkpoint=checkpoint,
        counts={
            "all": len(images),
            **counts,
            "unscored": int(images.score.isna().sum()),
        },
        threshold=threshold,
        metrics=[(*_IN_WORDS.get(name, (name, "")), value) for name, value in metrics.items()],
        absent=_absent_kind(counts),
        histogram=_inline(score_histogram(images, threshold), "Histogram of the anomaly scores"),
        curves=_inline(training_curves(losses), "Training and validation loss of every epoch"),
        kinds=record.by_kind().to_dict("records"),
        lists=record.case_lists(),
        settings=settings,
    )


def render_predictions(
    record: PredictionRecord,
    title: str,
    date: datetime,
    threshold: float | None,
    checkpoint: str | None = None,
    stopped_of: int | None = None,
) -> str:
    """Write the page of a prediction: all images by their scores, and a threshold to move.

    Args:
        record (PredictionRecord): The images, of which one at least.
        title (str): Model and data.
        date (datetime): When the prediction ended.
        threshold (float | None): Score above which an image is called anomalous, None where nothing is decided.
        checkpoint (str | None): File that the weights come from, where they come from one.
        stopped_of (int | None): Images that were to be predicted, 0 where that is not known; None where all were.

    Returns:
        str: HTML.

    Example:
        >>> from anomalib_intra.report.record import Scored
        >>> record = PredictionRecord()
        >>> record.add(Scored("parts/1.png", 0.7, called_anomalous=True), dict)
        >>> page = render_predictions(record, "InTra", datetime(2025, 1, 1), 0.5)
        >>> "parts" in page and "1.png" in page and "http" not in page
        True
    """
    images, cases = record.frame(), record.by_suspicion()
    finite = [image.score for image in record.images if math.isfinite(image.score)]
    start = threshold if threshold is not None else max(finite, default=0.0)
    lowest, highest = min([*finite, start]), max([*finite, start])
    # Room at both ends: at the lowest threshold all images are called anomalous, not all but one.
    room = 0.02 * (highest - lowest) or 0.01
    return _fill(
        "predictions.html",
        title=title,
        date=date,
        folder=record.folder,
        checkpoint=checkpoint,
        stopped_of=stopped_of,
        counts={
            **_counts(images),
            "called": int(images.called_anomalous.eq(True).sum()),
            "labelled": int(images.anomalous.notna().sum()),
            "unscored": len(images) - len(finite),
        },
        threshold=threshold,
        start=start,
        lowest=lowest - room,
        highest=highest + room,
        cases=cases,
        pictured=sum(bool(case.panels) for case in cases),
    )


def _fill(template: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("anomalib_intra", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "data_uri": _data_uri,
        "figure": _number,
        "significant": "{:.4g}".format,
        "below": path_below,
    }
    environment.tests["finite"] = math.isfinite
    return environment.get_template(template).render(version=version("anomalib-intra"), **values)


def _counts(images: DataFrame) -> dict[str, int]:
    return {
        "normal": int(images.anomalous.eq(False).sum()),
        "anomalous": int(images.anomalous.eq(True).sum()),
        "false_alarms": int((images.anomalous.eq(False) & images.called_anomalous.eq(True)).sum()),
        "missed": int((images.anomalous.eq(True) & images.called_anomalous.eq(False)).sum()),
    }


def _absent_kind(counts: Mapping[str, int]) -> str:
    if bool(counts["normal"]) == bool(counts["anomalous"]):
        return ""
    return "anomalous" if counts["normal"] else "normal"


def _inline(figure: Figure | None, description: str) -> Markup | None:
    return None if figure is None else Markup(as_svg(figure, description))


def _data_uri(picture: Image.Image | Thumbnail) -> str:
    if isinstance(picture, Thumbnail):
        return "data:image/jpeg;base64," + base64.b64encode(picture.jpeg).decode()
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None or value != value else f"{value:.{digits}f}"
