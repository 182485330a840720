# SPDX-License-Identifier: Apache-2.0
"""What the InTra paper reports for MVTec AD (arXiv 2104.13897v1), Tables 1 and 2."""

from collections.abc import Sequence

from pandas import DataFrame

TEXTURES = ("carpet", "grid", "leather", "tile", "wood")
OBJECTS = (
    "bottle", "cable", "capsule", "hazelnut", "metal_nut", "pill", "screw", "toothbrush", "transistor", "zipper",
)  # fmt: skip

#: Mean image and pixel AUROC over all categories in the camera-ready version (ICIAP 2022), in percent.
CAMERA_READY_MEANS = {"image_AUROC": 95.0, "pixel_AUROC": 96.6}

_METHODS = ("Patch-SVDD", "RIAD", "CutPaste", "PaDiM", "InTra")
# As printed, but for RIAD's image AUROC on tile: Table 1 has 93.4, which is that of CutPaste beside it; RIAD's own
# paper has 98.7, with which the printed means come out. PaDiM reports no image AUROC per category.
_IMAGE_AUROC = """
carpet      92.9  84.2  93.1 -    98.8
grid        94.6  99.6  99.9 -   100.0
leather     90.9 100.0 100.0 -   100.0
tile        97.8  98.7  93.4 -    98.2
wood        96.5  93.0  98.6 -    98.0
textures    94.54 95.1  97.0 99.0 99.0
bottle      98.6  99.9  98.3 -   100.0
cable       90.3  81.9  80.6 -    84.2
capsule     76.7  88.4  96.2 -    86.5
hazelnut    92.0  83.3  97.3 -    95.7
metal_nut   94.0  88.5  99.3 -    96.9
pill        86.1  83.8  92.4 -    90.2
screw       81.3  84.5  86.3 -    95.7
toothbrush 100.0 100.0  98.3 -    99.7
transistor  91.5  90.9  95.5 -    95.8
zipper      97.9  98.1  99.4 -    99.4
objects     90.8  89.9  94.3 97.2 94.41
all         92.1  91.7  95.2 97.9 95.94
"""
_PIXEL_AUROC = """
carpet      92.6  96.3  98.3  99.1  99.2
grid        96.2  98.8  97.5  97.3  99.4
leather     97.4  99.4  99.5  99.2  99.5
tile        91.4  89.1  90.5  94.1  94.4
wood        90.8  85.8  95.5  94.9  90.5
textures    93.7  93.9  96.3  96.9  96.6
bottle      98.1  98.4  97.6  98.3  97.1
cable       96.8  84.2  90.0  96.7  93.2
capsule     95.8  92.8  97.4  98.5  97.7
hazelnut    97.5  96.1  97.3  98.2  98.3
metal_nut   98.0  92.5  93.1  97.2  93.3
pill        95.1  95.7  95.7  95.7  98.3
screw       95.7  98.8  96.7  98.5  99.5
toothbrush  98.1  98.9  98.1  98.8  99.0
transistor  97.0  87.7  93.0  97.5  96.1
zipper      95.1  97.8  99.3  98.5  99.2
objects     96.7  94.3  95.8  97.8  97.17
all         95.7  94.2  96.0  97.5  96.98
"""


def published(metric: str) -> DataFrame:
    """Give a table of the paper.

    Args:
        metric (str): ``"image_AUROC"`` (Table 1) or ``"pixel_AUROC"`` (Table 2).

    Returns:
        DataFrame: Percentages as printed but for one misprint, NaN where none is; a row for each category and for the
        printed means ``textures``, ``objects`` and ``all``, a column for each method.

    Example:
        >>> float(published("image_AUROC").loc["screw", "InTra"])
        95.7
    """
    return read_printed({"image_AUROC": _IMAGE_AUROC, "pixel_AUROC": _PIXEL_AUROC}[metric], _METHODS)


def read_printed(printed: str, columns: Sequence[str]) -> DataFrame:
    """Read a table as the paper prints it.

    Args:
        printed (str): A line for each row: its name, then its figures, ``-`` where there is none.
        columns (Sequence[str]): What the figures are of.

    Returns:
        DataFrame: The figures, NaN where there is none.

    Example:
        >>> read_printed("screw 81.3 -", ["Patch-SVDD", "PaDiM"]).to_dict("index")
        {'screw': {'Patch-SVDD': 81.3, 'PaDiM': nan}}
    """
    rows = {name: figures for name, *figures in map(str.split, printed.strip().splitlines())}
    return DataFrame.from_dict(rows, orient="index", columns=list(columns)).replace("-", "nan").astype(float)
