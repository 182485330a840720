# SPDX-License-Identifier: Apache-2.0
"""Measured and published figures side by side, category by category, and tables in Markdown."""

from collections.abc import Sequence

from pandas import DataFrame, concat

from anomalib_intra.benchmark.published import CAMERA_READY_MEANS, OBJECTS, TEXTURES, published

_GROUPS = {"textures": TEXTURES, "objects": OBJECTS}


def comparison(rows: DataFrame, metric: str) -> DataFrame:
    """Set models side by side in one metric.

    A mean is over the benchmark's own categories, for the published methods too, and is missing where one of them is.

    Args:
        rows (DataFrame): Rows of runs, with ``model``, ``category``, ``seed`` and the metric in 0 .. 1.
        metric (str): Name of the metric.

    Returns:
        DataFrame: Percentages, mean over seeds; a row for each category in the paper's order, then for the means of
        textures, objects and all; a column for each model, then, for the metrics of Tables 1 and 2, for each published
        method.

    Example:
        >>> rows = DataFrame({"model": "A", "category": ["grid", "screw"], "seed": 1, "image_AUROC": [0.9, 0.8]})
        >>> float(comparison(rows, "image_AUROC").loc["mean of all (2)", "A"].round(6))
        85.0
    """
    table = by_category(rows, metric)
    categories = list(table.index)
    if metric in CAMERA_READY_MEANS:
        papers = published(metric).reindex(categories).add_suffix(", paper")
        table = concat([table, papers], axis="columns")
    means = {}
    for group, members in _GROUPS.items():
        of_group = [name for name in categories if name in members]
        if of_group:
            means[f"mean of {group} ({len(of_group)})"] = table.loc[of_group].mean(skipna=False)
    means[f"mean of all ({len(categories)})"] = table.mean(skipna=False)
    return concat([table, DataFrame(means).T])


def by_category(rows: DataFrame, metric: str) -> DataFrame:
    """Put a metric of every model and category into a table.

    Args:
        rows (DataFrame): As for :func:`comparison`.
        metric (str): Name of the metric.

    Returns:
        DataFrame: Percentages, mean over seeds; a row for each category in the paper's order, a column for each model.

    Example:
        >>> rows = DataFrame({"model": "A", "category": ["screw", "grid"], "seed": 1, "image_AUROC": [0.75, 0.5]})
        >>> by_category(rows, "image_AUROC")["A"].to_dict()
        {'grid': 50.0, 'screw': 75.0}
    """
    models = list(dict.fromkeys(rows["model"]))
    paper_order = [*TEXTURES, *OBJECTS]
    present = set(rows["category"])
    categories = [name for name in paper_order if name in present] + sorted(present - set(paper_order))
    values = 100 * rows.astype({metric: float}).pivot_table(
        index="category", columns="model", values=metric, aggfunc="mean", dropna=False
    )
    return values.reindex(index=categories, columns=models)


def summary(rows: DataFrame) -> DataFrame:
    """Sum every model up in a row: what it reaches, what it costs and what it saw.

    Args:
        rows (DataFrame): Rows of runs that ended well.

    Returns:
        DataFrame: A row for each model. Means over the categories are NaN where one is missing.

    Example:
        >>> row = {"model": "A", "seed": 1, "fit_s": 90.0, "ms_per_image": 5.0, "pretrained": "nothing"}
        >>> metrics = {"image_AUROC": 0.75, "pixel_AUROC": 0.5, "pixel_AUPRO": None}
        >>> table = summary(DataFrame([{**row, **metrics, "category": name} for name in ("grid", "screw")]))
        >>> print(table.to_csv().splitlines()[1])
        A,75.0,50.0,,1.5,5.0,2 of 2,nothing
    """
    means = {
        name: by_category(rows, metric).mean(skipna=False)
        for name, metric in (
            ("image AUROC (%)", "image_AUROC"),
            ("pixel AUROC (%)", "pixel_AUROC"),
            ("AUPRO (%)", "pixel_AUPRO"),
        )
    }
    of_model = rows.groupby("model", sort=False)
    categories = of_model["category"].nunique()
    return DataFrame(
        {
            **means,
            "training (min)": of_model["fit_s"].mean() / 60,
            "ms per image": of_model["ms_per_image"].mean(),
            "categories": categories.astype(str) + f" of {rows['category'].nunique()}",
            "saw beside the training images": of_model["pretrained"].first(),
        }
    )


def published_means(metric: str) -> DataFrame:
    """Give the means over all 15 categories as they were printed.

    Args:
        metric (str): ``"image_AUROC"`` or ``"pixel_AUROC"``.

    Returns:
        DataFrame: One row of percentages, the camera-ready version's in a column of its own.

    Example:
        >>> float(published_means("pixel_AUROC")["InTra, camera-ready"].iloc[0])
        96.6
    """
    row = published(metric).loc[["all"]].rename(index={"all": "printed mean of all 15"})
    return row.assign(**{"InTra, camera-ready": CAMERA_READY_MEANS[metric]})


def markdown(table: DataFrame, digits: int | Sequence[int]) -> str:
    """Write a table of numbers in Markdown.

    Args:
        table (DataFrame): Numbers, NaN where there is none.
        digits (int | Sequence[int]): Digits after the point, of all columns or of each; texts stay as they are.

    Returns:
        str: The table.

    Example:
        >>> print(markdown(DataFrame({"a": [1.25, float("nan")]}, index=["x", "y"]), digits=1))
        |    |   a |
        |:---|----:|
        | x  | 1.2 |
        | y  |   - |
    """
    each = [digits] * len(table.columns) if isinstance(digits, int) else digits
    texts = table.astype(object)
    for column, number in zip(table.columns, each, strict=True):
        texts[column] = [
            value if isinstance(value, str) else "-" if value != value else f"{value:.{number}f}"
            for value in table[column]
        ]
    return texts.to_markdown(disable_numparse=True, colalign=["left", *["right"] * len(table.columns)])


def failures(rows: DataFrame) -> str:
    r"""List runs that failed, with their errors.

    Args:
        rows (DataFrame): Rows of runs, with ``model``, ``category``, ``seed`` and ``error``.

    Returns:
        str: The table in Markdown.

    Example:
        >>> print(failures(DataFrame([{"model": "A", "category": "grid", "seed": 1, "error": "no int | None"}])))
        | model   | category   |   seed | error          |
        |:--------|:-----------|-------:|:---------------|
        | A       | grid       |      1 | no int \| None |
    """
    listed = rows[["model", "category", "seed", "error"]]
    return listed.assign(error=listed["error"].str.replace("|", r"\|")).to_markdown(index=False)
