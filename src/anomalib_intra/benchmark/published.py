# SPDX-License-Identifier: Apache-2.0
"""What the InTra paper reports for MVTec AD (arXiv 2104.13897v1): Tables 1 and 2, and the ablation studies, 3 to 6."""

from collections.abc import Sequence
from dataclasses import dataclass

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
    return _read({"image_AUROC": _IMAGE_AUROC, "pixel_AUROC": _PIXEL_AUROC}[metric], _METHODS)


def _read(printed: str, columns: Sequence[str]) -> DataFrame:
    rows = {name: figures for name, *figures in map(str.split, printed.strip().splitlines())}
    return DataFrame.from_dict(rows, orient="index", columns=list(columns)).replace("-", "nan").astype(float)


@dataclass(frozen=True)
class Study:
    """One of the paper's ablation studies (sec. 4.3).

    Args:
        title (str): Its number and what it compares.
        headings (dict[str, str]): The paper's headings of columns, by the names of models in ``configs/ablations``.
        printed (str): A line for each category with its figures: all of detection, then all of segmentation.

    Example:
        >>> float(STUDIES["position"].published().loc["transistor", "Seg. Local"])
        82.6
    """

    title: str
    headings: dict[str, str]
    printed: str

    def published(self) -> DataFrame:
        """Give the table as printed.

        Returns:
            DataFrame: AUROC in percent; a row for each category; columns ``Det. ...``, then ``Seg. ...``.
        """
        columns = [f"{task} {heading}" for task in ("Det.", "Seg.") for heading in self.headings.values()]
        return _read(self.printed, columns)


#: Tables 3 to 6 by the names of the studies' configs.
STUDIES = {
    "long_residuals": Study(
        "Table 3: with and without long residual connections",
        {"InTra": "With", "InTra without long residuals": "Without"},
        """
        carpet      98.8  98.8 99.2 99.3
        leather    100.0  99.9 99.5 99.4
        wood        96.8  95.6 89.9 88.9
        toothbrush  99.7 100.0 99.0 98.9
        hazelnut    91.0  91.4 97.3 97.3
        """,
    ),
    "attention": Study(
        "Table 4: feature self-attention (MFSA) and plain self-attention (MSA)",
        {"InTra": "MFSA", "InTra with MSA": "MSA"},
        """
        carpet      98.8  98.8 99.2 99.3
        leather    100.0 100.0 99.5 99.5
        wood        96.8  96.8 89.9 89.3
        toothbrush  99.7  98.9 99.0 98.8
        hazelnut    91.0  89.7 97.3 96.6
        """,
    ),
    "position": Study(
        "Table 5: local and global positions",
        {"InTra with local positions": "Local", "InTra": "Global"},
        """
        transistor 80.4 95.8 82.6 96.1
        metal_nut  86.4 92.5 77.4 80.5
        """,
    ),
    "window_size": Study(
        "Table 6: the side of a window in patches",
        {"InTra with windows of 5": "5 x 5", "InTra": "7 x 7", "InTra with windows of 9": "9 x 9"},
        """
        hazelnut 91.1 91.0 92.5 96.4 97.3 97.3
        wood     96.1 96.8 97.3 89.4 89.9 90.3
        """,
    ),
}
