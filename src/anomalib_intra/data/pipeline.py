# SPDX-License-Identifier: Apache-2.0
"""What happens to an image between its file and the model, in a data set and in a pre-processor."""

import copy
import random
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from anomalib.data.transforms import ExportableCenterCrop, SquarePad
from torch.utils.data import ConcatDataset, Subset
from torchvision.transforms import v2

#: Transforms that give the same for the same image, whatever their arguments.
_FIXED = (
    v2.Resize, v2.CenterCrop, v2.Pad, v2.Grayscale, v2.ToDtype, v2.Identity, v2.Normalize,
    ExportableCenterCrop, SquarePad,
)  # fmt: skip

#: How often another transform is tried, to see whether it gives the same.
_TRIES = 16


def parts_of(transform: Any) -> list[Any]:
    """List the transforms that a transform is made of.

    Args:
        transform (Any): A transform, a ``Compose`` of several, or None.

    Returns:
        list[Any]: In the order in which they are applied.

    Example:
        >>> parts_of(v2.Compose([v2.Compose([v2.Grayscale(3)]), v2.CenterCrop(8)]))
        [Grayscale(num_output_channels=3), CenterCrop(size=(8, 8))]
    """
    if transform is None:
        return []
    if isinstance(transform, v2.Compose):
        return [part for inner in transform.transforms for part in parts_of(inner)]
    return [transform]


def is_surely_fixed(transform: Any) -> bool:
    """Tell whether an image is the same each time, as far as is known without trying.

    Args:
        transform (Any): As for :func:`parts_of`.

    Returns:
        bool: Whether it is made of transforms without randomness alone.
    """
    return all(type(part) in _FIXED for part in parts_of(transform))


def random_parts(transform: Any) -> list[str]:
    """Name the transforms that give something else each time.

    Args:
        transform (Any): As for :func:`parts_of`.

    Returns:
        list[str]: Their classes' names.

    Example:
        >>> random_parts(v2.Compose([v2.Resize((8, 8)), v2.RandomHorizontalFlip(), v2.RandomAutocontrast(p=1.0)]))
        ['RandomHorizontalFlip']
    """
    return [type(part).__name__ for part in _random(transform)]


def without_random_parts(transform: Any) -> Any:
    """Leave out what gives something else each time.

    Args:
        transform (Any): As for :func:`parts_of`.

    Returns:
        Any: The transform itself where nothing does.
    """
    dropped = _random(transform)
    if not dropped:
        return transform
    kept = [part for part in parts_of(transform) if not any(part is one for one in dropped)]
    return v2.Compose(kept) if kept else None


def refuse_random(transform: Any, where: str) -> None:
    """Refuse a transform that gives something else each time, where scores depend on it.

    Args:
        transform (Any): As for :func:`parts_of`.
        where (str): Where it stands, for the message.

    Raises:
        ValueError: If it has such a part.

    Example:
        >>> refuse_random(v2.RandomRotation(5), "The pre-processor")
        Traceback (most recent call last):
        ...
        ValueError: The pre-processor has RandomRotation, which would change test images at random, and their scores \
with them: give it to the datamodule as train_augmentations.
    """
    if names := random_parts(transform):
        msg = (
            f"{where} has {', '.join(names)}, which would change test images at random, and their scores with them: "
            "give it to the datamodule as train_augmentations."
        )
        raise ValueError(msg)


def transform_of(dataset: Any) -> Any:
    """Find what a data set does to the images it reads.

    Args:
        dataset (Any): A data set, or a subset of one.

    Returns:
        Any: anomalib's ``augmentations`` (of a PredictDataset, the ``transform``); None where there is nothing, or
        nothing that is known.
    """
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if isinstance(dataset, ConcatDataset):
        return transform_of(dataset.datasets[0])
    return getattr(dataset, "augmentations", getattr(dataset, "transform", None))


def seen_through(dataset: Any, transform: Any) -> Any:
    """Give the same images, changed in another way.

    Args:
        dataset (Any): A data set of anomalib, or a subset of one; others are given back as they are.
        transform (Any): Takes the place of the data set's ``augmentations``.

    Returns:
        Any: A copy; the data set stays as it is.
    """
    if isinstance(dataset, Subset):
        return Subset(seen_through(dataset.dataset, transform), dataset.indices)
    if isinstance(dataset, ConcatDataset):
        return ConcatDataset([seen_through(part, transform) for part in dataset.datasets])
    if not hasattr(dataset, "augmentations"):
        return dataset
    dataset = copy.copy(dataset)
    dataset.augmentations = transform
    return dataset


def evaluation_transform(datamodule: Any, training: Any, validation: Any) -> Any:
    """Find what is done to test images before the pre-processor.

    Args:
        datamodule (Any): The datamodule, or None.
        training (Any): Data set of training images.
        validation (Any): Data set of validation images; empty where there are none.

    Returns:
        Any: What the datamodule does to test images; where there is none, what the validation images get; where there
        are none either, what the training images get, without what is random.
    """
    if isinstance(datamodule, AnomalibDataModule):
        tested = (getattr(datamodule, name, None) for name in ("test_data", "val_data"))
        datasets = [dataset for dataset in tested if dataset]
    else:
        datasets = [validation] if len(validation) > 0 and _has_transform(validation) else []
    return transform_of(datasets[0]) if datasets else without_random_parts(transform_of(training))


def described(transform: Any, resize: Any = None) -> str:
    """Put a transform into words, to compare two.

    Args:
        transform (Any): As for :func:`parts_of`.
        resize (Any): A resize that goes without saying, since the pre-processor has it too.

    Returns:
        str: Words, empty for nothing.

    Example:
        >>> described(v2.Compose([v2.CenterCrop(8), v2.Resize((4, 4))]), resize=v2.Resize((4, 4)))
        'CenterCrop(size=(8, 8))'
        >>> described(v2.Resize((4, 4)), resize=v2.Resize((4, 4), v2.InterpolationMode.BILINEAR))
        ''
    """
    own = _in_words(resize)
    return ", ".join(words for words in map(_in_words, parts_of(transform)) if words != own)


def _in_words(part: Any) -> str:
    # torchvision keeps the interpolation as it was given, its own default as a string; a checkpoint has the enum.
    return re.sub(r"InterpolationMode\.(\w+)", lambda mode: mode[1].lower(), repr(part))


def _has_transform(dataset: Any) -> bool:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return hasattr(dataset, "augmentations")


def _random(transform: Any) -> list[Any]:
    parts = parts_of(transform)
    if all(type(part) in _FIXED for part in parts):
        return []
    found = []
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    with _generators_left_alone():
        for part in parts:
            if type(part) not in _FIXED and _differs(part, image):
                found.append(part)
            try:
                image = torch.as_tensor(part(image))
            except Exception:  # made for other images than this one: the next part gets what this one got
                continue
    return found


def _differs(part: Any, image: torch.Tensor) -> bool:
    try:
        first, *others = (_seeded(part, image, seed) for seed in range(_TRIES))
    except Exception:  # made for other images: its name has to do
        return type(part).__name__.startswith("Random")
    if any(other.shape != first.shape or not torch.equal(other, first) for other in others):
        return True
    chance = getattr(part, "p", None)
    return isinstance(chance, float) and 0 < chance < 1  # so seldom that it was not seen


def _seeded(part: Any, image: torch.Tensor, seed: int) -> torch.Tensor:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    return torch.as_tensor(part(image.clone()))


@contextmanager
def _generators_left_alone() -> Iterator[None]:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def datasets_of(loaders: Any) -> Iterator[Any]:
    """Yield the data sets of a loader, or of several.

    Args:
        loaders (Any): A DataLoader, several, or None.

    Yields:
        Any: Data sets.
    """
    for loader in loaders if isinstance(loaders, Iterable) and not hasattr(loaders, "dataset") else [loaders]:
        if hasattr(loader, "dataset"):
            yield loader.dataset
