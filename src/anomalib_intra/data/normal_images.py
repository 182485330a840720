# SPDX-License-Identifier: Apache-2.0
"""Which images a model trains on, is stopped by and is calibrated with (sec. 4.1), for any datamodule."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.utils import ValSplitMode, split_by_label
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from anomalib_intra.data.pipeline import evaluation_transform, is_surely_fixed, refuse_random, seen_through

logger = logging.getLogger(__name__)

#: Share of the normal training images that is held out, and at most how many.
HELD_OUT_SHARE = 0.1
HELD_OUT_MOST = 20

#: Where validation images are test images.
SPLITS_FROM_TEST = (ValSplitMode.SAME_AS_TEST, ValSplitMode.FROM_TEST)


def held_out_indices(count: int, seed: int = 0) -> list[int]:
    """Choose the images that are held out from training: 10 %, at least one and at most 20 (sec. 4.1).

    Args:
        count (int): Number of normal training images.
        seed (int): Seed of the choice.

    Returns:
        list[int]: Sorted indices of the held-out images.

    Raises:
        ValueError: If there are fewer than two images.

    Example:
        >>> held_out_indices(30, seed=0) == held_out_indices(30, seed=0), len(held_out_indices(209))
        (True, 20)
    """
    if count < 2:
        msg = f"Training needs at least 2 normal training images, one of them to validate on; found {count}."
        raise ValueError(msg)
    number = min(max(1, round(HELD_OUT_SHARE * count)), HELD_OUT_MOST)
    return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:number].tolist())


class Share(DistributedSampler[Any]):
    """Every n-th image for each of n processes, in order.

    Lightning's own way repeats images until all processes have equally many, which changes means, thresholds and
    metrics.

    Args:
        dataset (Dataset): Images.
        rank (int): Number of this process, from 0.
        num_replicas (int): Number of processes.

    Example:
        >>> [list(Share([10, 20, 30], rank, 2)) for rank in (0, 1)]
        [[0, 2], [1]]
    """

    def __init__(self, dataset: Dataset[Any], rank: int, num_replicas: int) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False)

    def __iter__(self) -> Iterator[int]:
        """Yield indices of images."""
        return iter(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]

    def __len__(self) -> int:
        """Number of images of this process."""
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


@dataclass
class NormalImages:
    """The loaders of a training run.

    All but the one to train on give images as the test will: through what the datamodule does to test images.

    Of several processes, each trains on samples from all images and evaluates a share of them: every n-th image. Where
    there are fewer held-out images than processes, each takes all of them, since Lightning cannot wait for a process
    that has nothing to validate.

    Args:
        training (DataLoader): Normal images to sample from, shuffled, augmented as the datamodule says.
        statistics (DataLoader): The same images as the test would see them, to calibrate with: the training mean of
            InTra (eq. 17), the memory bank of Patch-SVDD.
        held_out (DataLoader): Images that are never trained on; the normal ones give the validation loss.
        thresholds (DataLoader): Images to set thresholds on: held-out ones, or the datamodule's validation images.
        same_every_epoch (bool): Whether a training image is the same each time it is read, as far as is known.
        few (DataLoader | None): Some of ``statistics``, to calibrate with for the time being while training.
        anomalies_held_out (bool): Whether ``held_out`` has anomalies, as far as is known.
    """

    training: DataLoader[Any]
    statistics: DataLoader[Any]
    held_out: DataLoader[Any]
    thresholds: DataLoader[Any]
    same_every_epoch: bool
    few: DataLoader[Any] | None = None
    anomalies_held_out: bool = False

    @classmethod
    def of(
        cls,
        train_loader: DataLoader[Any],
        val_loader: DataLoader[Any] | None,
        datamodule: Any,
        evaluated_at_once: int = 1,
        rank: int = 0,
        world_size: int = 1,
        scored: bool = False,
    ) -> "NormalImages":
        """Sort out the images of a datamodule, or of two plain loaders, without changing either.

        The datamodule's own validation images are used where they were taken from the training set or lie in a folder
        of their own. Where they are test images, or where none of them is normal, 10 % of the training images are held
        out instead, so that no test image decides when training stops.

        Args:
            train_loader (DataLoader): Loader of normal training images.
            val_loader (DataLoader | None): Loader of validation images.
            datamodule (Any): The datamodule both come from, or None.
            evaluated_at_once (int): Batch size of all loaders but the training one. Small batches let progress bars
                move while a large model works.
            rank (int): Number of this process, from 0.
            world_size (int): Number of processes.
            scored (bool): Whether validation images are scored while training. Where they were set apart from the test
                images, they are then added to ``held_out``.

        Returns:
            NormalImages: The loaders.

        Raises:
            ValueError: If there are too few images, if test images are changed at random, or if a loader chooses among
                the images of its data set.
        """
        for loader in (train_loader, val_loader):
            _refuse_choice(loader)
        # Any, since torch's Dataset has no length.
        dataset: Any = train_loader.dataset
        if isinstance(dataset, AnomalibDataset) and dataset.has_anomalous:
            dataset, _ = split_by_label(dataset)
        val_images: Any = val_loader.dataset if val_loader is not None else []
        tested_through = evaluation_transform(datamodule, dataset, val_images)
        refuse_random(tested_through, "What the datamodule does to test images")
        plain = seen_through(dataset, tested_through)
        if isinstance(datamodule, AnomalibDataModule):
            val_images = seen_through(val_images, tested_through)

        def training(images: Any) -> DataLoader[Any]:
            return _loader(images, train_loader, train_loader.batch_size, shuffle=True)

        def evaluation(images: Any) -> DataLoader[Any]:
            return shared_loader(images, val_loader or train_loader, evaluated_at_once, rank, world_size)

        def by_all(images: Any) -> DataLoader[Any]:
            ranks = (rank, world_size) if len(images) >= world_size else (0, 1)
            return shared_loader(images, val_loader or train_loader, evaluated_at_once, *ranks)

        def few_of(images: Any) -> DataLoader[Any]:
            return by_all(Subset(images, range(0, len(images), math.ceil(len(images) / HELD_OUT_MOST))))

        same_every_epoch = isinstance(dataset, AnomalibDataset) and is_surely_fixed(dataset.augmentations)
        mode = getattr(datamodule, "val_split_mode", None)
        if mode not in SPLITS_FROM_TEST and _has(val_images, "has_normal"):
            return cls(
                training(dataset),
                evaluation(plain),
                by_all(val_images),
                evaluation(val_images),
                same_every_epoch,
                few_of(plain),
                _has(val_images, "has_anomalous"),
            )

        chosen = held_out_indices(len(dataset))
        if mode in SPLITS_FROM_TEST:
            logger.warning(
                "The validation images of %s are test images (val_split_mode=%s). They will not decide when "
                "training stops: %d of the training images are held out for that. But they do set the thresholds; set "
                "val_split_mode=from_train on the datamodule (or use anomalib_intra.MVTec) to leave the test set "
                "untouched until the test.",
                type(datamodule).__name__,
                mode.value,
                len(chosen),
            )
        rest = sorted(set(range(len(dataset))) - set(chosen))
        held_out: Any = Subset(plain, chosen)
        # F1 needs both kinds: of anomalies alone, the lowest score would become the threshold.
        decided_on = held_out
        if len(val_images) > 0:
            decided_on = val_images if _has(val_images, "has_normal") else ConcatDataset([val_images, held_out])
        # Those of same_as_test are the test images themselves: whatever is monitored would be chosen by them.
        scores_others = scored and mode != ValSplitMode.SAME_AS_TEST and _has(val_images, "has_anomalous")
        return cls(
            training(Subset(dataset, rest)),
            evaluation(Subset(plain, rest)),
            by_all(ConcatDataset([held_out, val_images]) if scores_others else held_out),
            evaluation(decided_on),
            same_every_epoch,
            few_of(Subset(plain, rest)),
            scores_others,
        )


def _has(images: Any, kind: str) -> bool:
    """Tell whether some images have a property of anomalib's data sets; of others it is not known, and assumed."""
    return len(images) > 0 and bool(getattr(images, kind, True))


def _refuse_choice(loader: DataLoader[Any] | None) -> None:
    """Refuse a loader that takes only some images of its data set, or some more often: others are made from that."""
    if loader is None:
        return
    sampler: Any = loader.sampler
    takes_each_once = isinstance(sampler, DistributedSampler) or (
        isinstance(sampler, RandomSampler | SequentialSampler)
        and not getattr(sampler, "replacement", False)
        and len(sampler) == len(loader.dataset)  # type: ignore[arg-type]
    )
    if loader.batch_size is None or not takes_each_once:
        msg = (
            f"A loader with a {type(sampler).__name__} or a batch_sampler of its own would lose it here, and with it "
            "the choice of images: give it a torch.utils.data.Subset of them, and batch_size and shuffle."
        )
        raise ValueError(msg)


def shared_loader(
    dataset: Dataset[Any], like: DataLoader[Any], batch_size: int, rank: int, world_size: int
) -> DataLoader[Any]:
    """Load this process's share of images, in order.

    Args:
        dataset (Dataset): Images.
        like (DataLoader): Loader whose workers and collation are taken over.
        batch_size (int): Images in a batch.
        rank (int): Number of this process, from 0.
        world_size (int): Number of processes.

    Returns:
        DataLoader: The loader.
    """
    return _loader(dataset, like, batch_size, sampler=Share(dataset, rank, world_size))


def _loader(
    dataset: Dataset[Any],
    like: DataLoader[Any],
    batch_size: int | None,
    shuffle: bool = False,
    sampler: Share | None = None,
) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        sampler=sampler,
        num_workers=like.num_workers,
        collate_fn=like.collate_fn,
        pin_memory=like.pin_memory,
        generator=torch.Generator(),
        persistent_workers=shuffle and like.num_workers > 0,
    )
