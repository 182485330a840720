# SPDX-License-Identifier: Apache-2.0
"""The charts of a benchmark: what a model reaches for the time it trains, and each category by itself."""

from itertools import cycle

from matplotlib.figure import Figure
from pandas import DataFrame

from anomalib_intra.benchmark.tables import by_category, comparison

_METRICS = ("image_AUROC", "pixel_AUROC")
_MARKERS = "osD^vP*Xh"
_SHORTEST = 0.1  # minutes; what takes no time at all lies at the left edge of a logarithmic axis


def chart_of_time(rows: DataFrame) -> Figure:
    """Draw the mean AUROC of every model against the minutes that it trained for.

    Args:
        rows (DataFrame): Rows of runs that ended well.

    Returns:
        Figure: Two panels, images and pixels. The marker of a model that lacks a category is hollow, and its mean is
        over those it has.

    Example:
        >>> row = {"model": "A", "category": "grid", "seed": 1, "image_AUROC": 0.9, "pixel_AUROC": 0.8, "fit_s": 60.0}
        >>> [axes.get_ylabel() for axes in chart_of_time(DataFrame([row])).axes]
        ['image AUROC (%)', 'pixel AUROC (%)']
    """
    figure = Figure(figsize=(11, 5))
    minutes = (rows.groupby("model", sort=False)["fit_s"].mean() / 60).clip(lower=_SHORTEST)
    categories = rows["category"].nunique()
    for axes, metric in zip(figure.subplots(1, 2), _METRICS, strict=True):
        table = by_category(rows, metric)
        for model, marker in zip(minutes.index, cycle(_MARKERS), strict=False):
            known = table[model].dropna()
            if known.empty:
                continue
            whole = len(known) == categories
            label = model if whole else f"{model} ({len(known)} of {categories})"
            face = {} if whole else {"markerfacecolor": "none"}
            axes.plot(minutes[model], known.mean(), marker, markersize=9, linestyle="", label=label, **face)
        axes.set_xscale("log")
        axes.set_xlabel(f"training (minutes; {_SHORTEST:g} or less at the left)")
        axes.set_ylabel(f"{metric.replace('_', ' ')} (%)")
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=5, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.88))
    return figure


def chart_of_categories(rows: DataFrame) -> Figure:
    """Draw image and pixel AUROC of every model and category.

    Args:
        rows (DataFrame): Rows of runs that ended well.

    Returns:
        Figure: Two bar charts; the paper's InTra is marked where it has the category.

    Example:
        >>> rows = DataFrame({"model": "A", "category": ["grid"], "seed": 1, "image_AUROC": 0.9, "pixel_AUROC": 0.8})
        >>> len(chart_of_categories(rows).axes)
        2
    """
    figure = Figure(figsize=(max(7.0, 1.2 + 0.35 * rows["category"].nunique() * (rows["model"].nunique() + 1)), 7))
    models = list(dict.fromkeys(rows["model"]))
    for axes, metric in zip(figure.subplots(2, 1, sharex=True), _METRICS, strict=True):
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
