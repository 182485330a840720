# SPDX-License-Identifier: Apache-2.0
"""Whether good and bad images lie apart; anomalib's ``Folder`` reads folders with all that is below them."""

import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
from anomalib.data import AnomalibDataset
from anomalib.data.datasets.image.folder import FolderDataset

logger = logging.getLogger(__name__)

#: Folders that are named.
_NAMED = 5


def refuse_contradictory(datamodule: Any) -> None:
    """Refuse files that are good and bad ones at once.

    Args:
        datamodule (Any): The datamodule of a training, set up. Only a ``Folder`` is looked at.

    Raises:
        ValueError: If a file is among the good images and among the bad ones.
    """
    training, evaluated = _samples_of(datamodule)
    if training is None:
        return
    kinds = pd.concat([training.samples, *evaluated]).groupby("image_path").label_index.nunique()
    contradictory = list(kinds.index[kinds > 1])
    if contradictory:
        msg = (
            f"{len(contradictory)} images are among the good ones and among the bad ones, such as {contradictory[0]}: "
            "subfolders are read, too, so keep the folder of bad images out of that of good ones."
        )
        raise ValueError(msg)


def warn_of_folders(datamodule: Any) -> None:
    """Tell of images that may be trained on by mistake: also tested on, or from a folder below that of good ones.

    Args:
        datamodule (Any): The datamodule of a training, set up. Only a ``Folder`` is looked at.
    """
    training, evaluated = _samples_of(datamodule)
    if training is None:
        return
    trained = set(training.samples.image_path)
    also_evaluated = sorted({path for samples in evaluated for path in samples.image_path if path in trained})
    if also_evaluated:
        logger.warning(
            "%d of %d training images are validated or tested on, too, such as %s: scores will be too good. Subfolders "
            "are read, too, so keep the folder of good test images out of that of training images.",
            len(also_evaluated),
            len(trained),
            also_evaluated[0],
        )
    _tell_of_subfolders(training)


def _samples_of(datamodule: Any) -> tuple[FolderDataset | None, list[pd.DataFrame]]:
    training, *others = (getattr(datamodule, f"{split}_data", None) for split in ("train", "val", "test"))
    evaluated = [dataset.samples for dataset in others if isinstance(dataset, AnomalibDataset)]
    return (training if isinstance(training, FolderDataset) else None), evaluated


def _tell_of_subfolders(training: FolderDataset) -> None:
    given = training.normal_dir
    folders = Counter(Path(path).parent for path in training.samples.image_path)
    if len(folders) <= (1 if isinstance(given, str | Path) else len(given)):
        return
    # Subfolders alone may be days or cameras; one beside images is rather of others that were put there.
    is_odd = any(not folders.keys().isdisjoint(folder.parents) for folder in folders)
    try:
        outside = Path(os.path.commonpath(folders)).parent
    except ValueError:  # on several drives
        outside = None
    named = [
        f"{count} from {folder.relative_to(outside) if outside else folder}"
        for folder, count in folders.most_common(_NAMED)
    ]
    logger.log(
        logging.WARNING if is_odd else logging.INFO,
        "Training images come from %d folders (%s%s): all count as good ones.",
        len(folders),
        ", ".join(named),
        ", ..." if len(folders) > _NAMED else "",
    )
