# SPDX-License-Identifier: Apache-2.0
"""MVTec AD with the validation protocol of the paper (sec. 4.1)."""

from pathlib import Path
from typing import Any

from anomalib.data import MVTecAD
from anomalib.data.datasets.image.mvtecad import CATEGORIES
from anomalib.data.utils import ValSplitMode
from anomalib.data.utils.path import contains_non_printable_characters, is_path_too_long

from anomalib_intra.data.normal_images import HELD_OUT_MOST, HELD_OUT_SHARE, held_out_indices


class MVTec(MVTecAD):
    """anomalib's MVTecAD, validated on held-out training images instead of on the test set.

    10 % of the normal training images, at most 20, chosen by ``seed``, are held out for validation (sec. 4.1). No test
    image is seen before the test.

    Args:
        root (Path | str): Folder of the data set, which holds a folder for each category.
        category (str): Category, such as ``"bottle"``.
        val_split_mode (ValSplitMode | str): ``from_train`` is the paper's; anomalib's other modes work as well.
        seed (int): Seed of the choice.
        val_split_ratio (float | None): Share of the images that anomalib's other modes take, 0.5 by default. With
            ``from_train`` there is none to give: the share is the paper's.
        **kwargs: As for :class:`anomalib.data.MVTecAD` (batch sizes, workers, augmentations, ...).

    Raises:
        ValueError: If there is no such category, anomalib does not read from such a path, or a share is given that
            would not be heeded.

    Example:
        >>> MVTec(category="bottle").name
        'MVTecAD'
        >>> MVTec(category="botle")
        Traceback (most recent call last):
        ...
        ValueError: MVTecAD has no category 'botle'; it has bottle, cable, capsule, carpet, grid, hazelnut, leather, \
metal_nut, pill, screw, tile, toothbrush, transistor, wood, zipper.
    """

    #: Categories of the data set.
    categories: tuple[str, ...] = CATEGORIES
    seed: int

    def __init__(
        self,
        root: Path | str = "./datasets/MVTecAD",
        category: str = "bottle",
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 8,
        val_split_mode: ValSplitMode | str = ValSplitMode.FROM_TRAIN,
        seed: int = 0,
        val_split_ratio: float | None = None,
        **kwargs: Any,
    ) -> None:
        if category not in self.categories:
            msg = f"{self.name} has no category {category!r}; it has {', '.join(self.categories)}."
            raise ValueError(msg)
        folder = Path(root) / category
        if contains_non_printable_characters(folder) or is_path_too_long(folder):
            msg = (
                f"anomalib reads data sets only from paths of at most 512 ASCII characters, not from {folder}: give "
                "root as a shorter path, one relative to the working directory, or a link."
            )
            raise ValueError(msg)
        if val_split_ratio is not None and ValSplitMode(val_split_mode) == ValSplitMode.FROM_TRAIN:
            msg = (
                f"{type(self).__name__} holds out the paper's {HELD_OUT_SHARE:.0%} of the training images, at most "
                f"{HELD_OUT_MOST}: leave val_split_ratio={val_split_ratio} out, or take anomalib's MVTecAD with "
                "val_split_mode=from_train."
            )
            raise ValueError(msg)
        super().__init__(
            root=root,
            category=category,
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            val_split_mode=val_split_mode,
            val_split_ratio=0.5 if val_split_ratio is None else val_split_ratio,
            seed=seed,
            **kwargs,
        )

    @property
    def name(self) -> str:
        """The data set's name, so that results stand beside those of anomalib's MVTecAD."""
        return "MVTecAD"

    def prepare_data(self) -> None:
        """Download the data set if it is not there.

        Raises:
            FileNotFoundError: If the category is not there and cannot be downloaded.
        """
        try:
            super().prepare_data()
        except (OSError, RuntimeError) as error:
            msg = (
                f"There is no folder {self.root / self.category}, and MVTec AD could not be downloaded ({error}): "
                "set the datamodule's root to the folder that holds the categories."
            )
            raise FileNotFoundError(msg) from error

    def _create_val_split(self) -> None:
        if self.val_split_mode != ValSplitMode.FROM_TRAIN:
            super()._create_val_split()
            return
        chosen = set(held_out_indices(len(self.train_data), self.seed))
        self.val_data = self.train_data.subsample(sorted(chosen))
        self.train_data = self.train_data.subsample([n for n in range(len(self.train_data)) if n not in chosen])
