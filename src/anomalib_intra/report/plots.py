# SPDX-License-Identifier: Apache-2.0
"""The plots of a report: training curves and score histogram, as files or as part of a page."""

import io
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pandas import DataFrame, Series

# Blue and vermilion of Okabe and Ito, told apart with every kind of colour vision; shapes tell the same as colours.
NORMAL, ANOMALOUS, UNKNOWN = "#0072b2", "#d55e00", "#767676"
_INK = "#1b1b1b"
# In a page, colours follow its light or dark scheme.
_IN_PAGE = {
    NORMAL: "var(--normal)",
    ANOMALOUS: "var(--anomalous)",
    UNKNOWN: "var(--quiet)",
    _INK: "currentColor",
}
_SIZE = (4.6, 3.0)  # inches: small enough that a telephone need not shrink the text out of sight
_BINS = 30


def training_curves(losses: Sequence[dict[str, float]]) -> Figure | None:
    """Draw the losses of every epoch.

    Args:
        losses (Sequence[dict]): A row for each epoch: ``epoch`` and, where known, ``train_loss`` and ``val_loss``.

    Returns:
        Figure | None: The curves, None where there is nothing to draw.

    Example:
        >>> training_curves([{"epoch": 0, "train_loss": 1.0}, {"epoch": 1, "train_loss": 0.5}]).axes[0].get_xlabel()
        'epoch'
        >>> training_curves([]) is None
        True
    """
    table = DataFrame(losses, columns=["epoch", "train_loss", "val_loss"]).astype(float)
    known = table[["train_loss", "val_loss"]].to_numpy()
    known = known[np.isfinite(known)]
    if not len(known):
        return None
    figure, (axes,) = _figure()
    for column, label, colour, dashes in (
        ("train_loss", "training", NORMAL, (4, 2)),
        ("val_loss", "validation", ANOMALOUS, (None, None)),
    ):
        drawn = table[np.isfinite(table[column].to_numpy())]
        if len(drawn):
            marker = "o" if len(drawn) < 30 else None
            axes.plot(drawn.epoch, drawn[column], color=colour, dashes=dashes, marker=marker, ms=4, label=label)
    if table.val_loss.notna().any():
        best = int(table.epoch.iloc[int(table.val_loss.argmin())])
        axes.axvline(best, color=_INK, lw=0.8, ls=":", label=f"lowest validation: epoch {best}")
    if known.min() > 0 and known.max() > 10 * known.min():
        axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, labelcolor=_INK)
    return figure


def score_histogram(images: DataFrame, threshold: float | None) -> Figure | None:
    """Draw how many images have which score: normal images above, anomalous ones below, on one axis.

    Args:
        images (DataFrame): Images with ``score`` and ``anomalous``, see :meth:`TestRecord.frame`.
        threshold (float | None): Score above which an image is called anomalous.

    Returns:
        Figure | None: The histogram, None without finite scores.

    Example:
        >>> images = DataFrame({"score": [0.2, 0.7], "anomalous": [False, True]})
        >>> [axes.get_ylabel() for axes in score_histogram(images, 0.5).axes]
        ['normal', 'anomalous']
    """
    images = images[np.isfinite(images.score.to_numpy())]
    groups: list[tuple[str, str, Series]] = [
        (label, colour, images.score[match])
        for label, colour, match in (
            ("normal", NORMAL, images.anomalous.eq(False)),
            ("anomalous", ANOMALOUS, images.anomalous.eq(True)),
            ("images", UNKNOWN, images.anomalous.isna()),
        )
        if match.any()
    ]
    if not groups:
        return None
    edges = np.histogram_bin_edges([*images.score, *([] if threshold is None else [threshold])], bins=_BINS)
    figure, rows = _figure(len(groups))
    for axes, (label, colour, scores) in zip(rows, groups, strict=True):
        axes.hist(scores, bins=list(edges), color=colour)
        axes.set_ylabel(label)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
        if threshold is not None:
            axes.axvline(threshold, color=_INK, lw=1.2, ls="--")
    if threshold is not None:
        above = rows[0].get_xaxis_transform()
        rows[0].text(threshold, 1.03, f"threshold {threshold:.3g}", transform=above, ha="center", color=_INK)
    rows[-1].set_xlabel("anomaly score")
    return figure


def as_svg(figure: Figure, description: str) -> str:
    """Turn a figure into a part of a page: it follows the page's colours and font, and needs nothing from elsewhere.

    Args:
        figure (Figure): The figure.
        description (str): What it shows, for those who cannot see it; may contain only safe text.

    Returns:
        str: An ``<svg>`` element.

    Example:
        >>> as_svg(training_curves([{"epoch": 0, "train_loss": 1.0}]), "Losses")[:41]
        '<svg role="img" aria-label="Losses" viewB'
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # The salt makes the page of a run the same whenever it is drawn.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    for colour, in_page in _IN_PAGE.items():
        svg = svg.replace(colour, in_page)
    width, height = (72 * side for side in figure.get_size_inches())
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    return f'<svg role="img" aria-label="{description}" viewBox="0 0 {width:g} {height:g}">{body}'


def _figure(rows: int = 1) -> tuple[Figure, list[Axes]]:
    # Without pyplot, which would keep every figure and want a display.
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes: list[Axes] = list(figure.subplots(rows, sharex=True, squeeze=False)[:, 0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.spines[["left", "bottom"]].set_color(_INK)
        one.tick_params(which="both", colors=_INK)
        one.xaxis.label.set_color(_INK)
        one.yaxis.label.set_color(_INK)
    return figure, axes
