# SPDX-License-Identifier: Apache-2.0
"""What is kept of a test or a prediction: the scores of all images, pictures of some."""

import heapq
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pandas import DataFrame, Series, concat
from torchmetrics.functional.classification import binary_auroc

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Scored:
    """An image of a test.

    Args:
        path (str): Its file.
        score (float): Anomaly score.
        anomalous (bool | None): Whether it is anomalous, where that is known.
        called_anomalous (bool | None): Whether the model calls it anomalous, where it decides.
    """

    path: str
    score: float
    anomalous: bool | None = None
    called_anomalous: bool | None = None

    @property
    def kind(self) -> str:
        """Its folder, which names the kind of defect in most data sets."""
        return Path(self.path).parent.name


@dataclass(frozen=True)
class Case:
    """A scored image with its panels, by their titles: pictures or, of predictions, thumbnails."""

    image: Scored
    panels: dict[str, Any]


@dataclass(frozen=True)
class CaseList:
    """The cases of one kind, the most telling one first."""

    title: str
    why: str
    cases: list[Case]


# The label of the images, whether the highest scores are kept, title and explanation: the most wrong first.
_LISTS: tuple[tuple[bool | None, bool, str, str], ...] = (
    (True, False, "Lowest-scored anomalous images", "What the model misses, or comes nearest to missing."),
    (False, True, "Highest-scored normal images", "False alarms, or what comes nearest to one."),
    (True, True, "Highest-scored anomalous images", "The clearest anomalies."),
    (False, False, "Lowest-scored normal images", "The clearest normal images."),
    (None, True, "Highest-scored images", "Whether they are anomalous is not known."),
    (None, False, "Lowest-scored images", "Whether they are anomalous is not known."),
)


@dataclass
class TestRecord:
    """Collects the images of a test, thousands of them if need be: pictures are drawn and kept of few.

    Args:
        cases (int): Pictures kept in each list of cases.

    Example:
        >>> record = TestRecord(cases=1)
        >>> for score in (0.2, 0.1, 0.3):
        ...     record.add(Scored(f"good/{score}.png", score, anomalous=False), dict)
        >>> [[case.image.score for case in cases.cases] for cases in record.case_lists()]
        [[0.3], [0.1]]
    """

    __test__ = False  # not a test, whatever pytest thinks of the name

    cases: int = 4
    images: list[Scored] = field(default_factory=list)
    _heaps: dict[tuple[bool | None, bool], list[tuple[float, int, Case]]] = field(default_factory=dict)
    _order: Iterator[int] = field(default_factory=count)

    def add(self, image: Scored, draw: Callable[[], dict[str, Any]]) -> None:
        """Add an image; it is drawn if it is among the lowest or highest of its label so far.

        Args:
            image (Scored): The image.
            draw (Callable): Draws its panels.
        """
        self.images.append(image)
        panels = None
        for kind, rank in self._ranks(image).items():
            heap = self._heaps.setdefault(kind, [])
            if len(heap) < self.cases or rank > heap[0][0]:
                panels = draw() if panels is None else panels
                # The running number decides between equal scores: the earlier image stays.
                push = heapq.heappush if len(heap) < self.cases else heapq.heapreplace
                push(heap, (rank, -next(self._order), Case(image, panels)))

    def _ranks(self, image: Scored) -> dict[tuple[bool | None, bool], float]:
        # What an image must exceed others by, in each of the lists it may be kept for.
        if not math.isfinite(image.score):
            return {}
        return {(image.anomalous, True): image.score, (image.anomalous, False): -image.score}

    @classmethod
    def merged(cls, records: Iterable["Self"]) -> "Self":
        """Put the records of several processes together.

        Args:
            records (Iterable[Self]): Records of parts of a test; images in several of them count once.

        Returns:
            Self: The record of all.
        """
        merged, seen = None, set()
        for record in records:
            merged = merged or cls(record.cases)
            kept = {case.image.path: case.panels for heap in record._heaps.values() for *_, case in heap}
            # Only for a moment can an image without panels be kept: the lowest and highest of all have them.
            panels = defaultdict(dict[str, Any], kept)
            for image in record.images:
                if image.path not in seen:
                    merged.add(image, partial(panels.__getitem__, image.path))
                    seen.add(image.path)
        return merged or cls()

    @property
    def folder(self) -> str:
        """The innermost folder that holds all images; empty where there is none."""
        try:
            return os.path.commonpath([Path(image.path).parent for image in self.images])
        except ValueError:  # no images, some on another drive, some without a path
            return ""

    def case_lists(self) -> list[CaseList]:
        """List the cases, each image once: in the first list it belongs to.

        Returns:
            list[CaseList]: Lists that are not empty; first those of the most wrongly scored images.
        """
        shown: set[int] = set()
        lists = []
        for anomalous, highest, title, why in _LISTS:
            heap = sorted(self._heaps.get((anomalous, highest), []), reverse=True)
            cases = [case for *_, case in heap if id(case.image) not in shown]
            shown |= {id(case.image) for case in cases}
            if cases:
                lists.append(CaseList(title, why, cases))
        return lists

    def frame(self) -> DataFrame:
        """Give the images as a table.

        Returns:
            DataFrame: A row for each image, with ``kind``, ``score``, ``anomalous`` and ``called_anomalous``.
        """
        columns = ["kind", "score", "anomalous", "called_anomalous"]
        rows = [[getattr(image, column) for column in columns] for image in self.images]
        types = {"score": float, "anomalous": object, "called_anomalous": object}
        return DataFrame(rows, columns=columns).astype(types)

    def by_kind(self) -> DataFrame:
        """Summarise the scores of every kind of image, normal ones first.

        Returns:
            DataFrame: A row for each kind, with ``kind``, ``anomalous``, ``images``, ``called_anomalous`` (their
            number), ``lowest``, ``median``, ``highest`` and ``auroc`` against all normal images (NaN for normal
            images, and without any).
        """
        images = self.frame()
        normal = images.score[images.anomalous.eq(False)]
        rows = []
        for known in (images.anomalous.eq(False), images.anomalous.eq(True), images.anomalous.isna()):
            for kind, group in images[known].groupby("kind"):
                anomalous = group.anomalous.iloc[0]
                rows.append(
                    {
                        "kind": kind,
                        "anomalous": anomalous,
                        "images": len(group),
                        "called_anomalous": int(group.called_anomalous.eq(True).sum()),
                        "lowest": group.score.min(),
                        "median": group.score.median(),
                        "highest": group.score.max(),
                        "auroc": auroc(group.score, normal) if anomalous else math.nan,
                    }
                )
        return DataFrame(rows)


@dataclass
class PredictionRecord(TestRecord):
    """Collects the images of a prediction, and pictures of the most suspicious of them.

    Args:
        cases (int): Pictures kept.

    Example:
        >>> record = PredictionRecord(cases=1)
        >>> for score in (0.2, 0.3, 0.1):
        ...     record.add(Scored(f"{score}.png", score), lambda: {"Image": "a picture"})
        >>> [(case.image.score, case.panels) for case in record.by_suspicion()]
        [(0.3, {'Image': 'a picture'}), (0.2, {}), (0.1, {})]
    """

    cases: int = 500

    def _ranks(self, image: Scored) -> dict[tuple[bool | None, bool], float]:
        return {(None, True): _suspicion(image)}

    def by_suspicion(self) -> list[Case]:
        """List all images, the most suspicious first.

        Returns:
            list[Case]: Images with panels, which are empty where none were kept.
        """
        panels = {id(case.image): case.panels for heap in self._heaps.values() for *_, case in heap}
        images = sorted(self.images, key=_suspicion, reverse=True)
        return [Case(image, panels.get(id(image), {})) for image in images]


def path_below(path: str, folder: str) -> str:
    """Name an image by what tells it from others.

    Args:
        path (str): Its file.
        folder (str): A folder that it lies in, such as that of all images; empty where there is none.

    Returns:
        str: The path from there; the whole path without a folder.

    Example:
        >>> path_below("parts/monday/good/0.png", "parts").replace(os.sep, "/")
        'monday/good/0.png'
    """
    return os.path.relpath(path, folder) if folder else path


def _suspicion(image: Scored) -> float:
    # An image that the model could give no score is the first that someone should look at.
    return image.score if math.isfinite(image.score) else math.inf


def auroc(anomalous: Series, normal: Series) -> float:
    """Tell how often an anomalous image has a higher score than a normal one; equal scores count half.

    Args:
        anomalous (Series): Scores of anomalous images, of any range; those that are NaN do not count.
        normal (Series): Scores of normal images, alike.

    Returns:
        float: The AUROC in [0, 1], NaN where nothing is left of one of both.

    Example:
        >>> auroc(Series([0.9, 0.4]), Series([0.1, 0.5]))
        0.75
    """
    scores = concat({1: anomalous, 0: normal}, names=["label"]).dropna()
    labels = scores.index.get_level_values("label")
    if labels.nunique() < 2:
        return math.nan  # torchmetrics says 0
    # By their ranks in (0, 1]: torchmetrics puts other scores through a sigmoid, which ties large ones.
    return float(binary_auroc(torch.tensor(scores.rank(pct=True).to_numpy()), torch.tensor(labels.to_numpy())))
