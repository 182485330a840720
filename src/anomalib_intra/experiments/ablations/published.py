# SPDX-License-Identifier: Apache-2.0
"""What the InTra paper reports of its ablation studies (arXiv 2104.13897v1), Tables 3 to 6."""

from dataclasses import dataclass

from pandas import DataFrame

from anomalib_intra.benchmark.published import read_printed


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
        return read_printed(self.printed, columns)


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
