# SPDX-License-Identifier: Apache-2.0
"""From a loader of images to a loader of training steps: random samples (windows, pairs of patches) of the images."""

from collections.abc import Callable, Iterator
from dataclasses import Field, replace
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader

#: Bytes of images, one for each pixel and channel, that are sampled from at a time; a usual training set fits at once.
POOL_BYTES = 2**30


class Samples(Protocol):
    """A dataclass of samples of images, such as ``WindowBatch``, with tensors of which each row belongs to one sample.

    Attributes:
        image (torch.Tensor): The images, shape ``(P, 3, H, W)``, as bytes or in [0, 1]: see :func:`as_fractions`.
        index (torch.Tensor): Which image each sample is from, shape ``(B,)``.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    image: torch.Tensor
    index: torch.Tensor

    def __len__(self) -> int:
        """Number of samples."""


_Samples = TypeVar("_Samples", bound=Samples)


class Prepared(NamedTuple):
    """Images that are ready to be sampled from.

    Args:
        images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``, on the model's device.
        names (list[str]): Their names, for messages.
    """

    images: torch.Tensor
    names: list[str]


class SampleLoader(Generic[_Samples]):
    """Turns a loader of images into a loader of training steps.

    Every epoch samples every image equally often and in random order, so that the samples of a step come from many
    images. Images are pooled up to :data:`POOL_BYTES` at a time and read once in an epoch; with ``same_every_epoch``,
    those that fit into one pool are read only once. The pool lies on the device of the model, as bytes: four times as
    many images fit as with float32, and no pixel of a resized image moves by more than 1 / 510.

    Several processes take the same samples and share each step's among them: the step is that of one process, whatever
    their number. What does not divide by it is left out, so that all shares count alike.

    The loader's state says which step comes next, so that a run can go on in the middle of an epoch.

    Args:
        images (DataLoader): Loader of image batches. Its ``generator`` is seeded anew for every epoch.
        prepare (Callable): Turns such a batch into :class:`Prepared` images.
        sample (Callable): ``sample(images, samples_per_image, generator=...)`` takes that many samples of each of
            ``(P, 3, H, W)`` images, which are bytes, shuffled.
        samples_per_image (int): Samples from each image and epoch.
        batch_size (int): Samples in a step, of all processes together.
        image_size (tuple[int, int]): Height and width of prepared images in pixels.
        seed (int): Seed of all samples; an epoch's samples depend on it and on ``epoch`` alone.
        same_every_epoch (bool): Whether an image is the same each time it is read.
        rank (int): Number of this process, from 0.
        world_size (int): Number of processes.

    Raises:
        ValueError: If a step has fewer samples than there are processes.
    """

    def __init__(
        self,
        images: DataLoader[Any],
        prepare: Callable[[Any], Prepared],
        sample: Callable[..., _Samples],
        samples_per_image: int,
        batch_size: int,
        image_size: tuple[int, int],
        seed: int,
        same_every_epoch: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < world_size:
            msg = (
                f"A training step of {batch_size} samples cannot be shared by {world_size} processes: train on fewer "
                "devices (--trainer.devices 1), or with more samples a step (the model's images_per_step, "
                "window_batch_size or pair_batch_size)."
            )
            raise ValueError(msg)
        self.images = images
        self.prepare = prepare
        self.sample = sample
        self.samples_per_image = samples_per_image
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        #: Names of the images that the present steps sample from.
        self.names: list[str] = []
        self._rank, self._world_size = rank, world_size
        self._next_step = 0
        self._resumed_epoch: int | None = None
        bytes_of_one = 3 * image_size[0] * image_size[1]
        read_at_once = images.batch_size or 1
        self._pool_size = max(1, POOL_BYTES // (bytes_of_one * read_at_once)) * read_at_once
        self._keeps = same_every_epoch and len(images.dataset) <= self._pool_size  # type: ignore[arg-type]
        self._kept: Prepared | None = None

    def __len__(self) -> int:
        """Steps of an epoch."""
        full, rest = divmod(len(self.images.dataset), self._pool_size)  # type: ignore[arg-type]
        return full * self._steps(self._pool_size) + self._steps(rest)

    def __iter__(self) -> Iterator[_Samples]:
        """Yield the steps of epoch ``epoch``, or those that are left of the epoch in which the run was cut off."""
        first = self._next_step if self._resumed_epoch == self.epoch else 0
        self._resumed_epoch = None
        self._next_step = 0
        # Apart enough that the epochs of two seeds do not repeat each other's samples.
        seed = self.seed * 1_000_003 + self.epoch
        generator = torch.Generator().manual_seed(seed)
        for pool in self._kept_pool() if self._keeps else self._pools(seed):
            self.names = pool.names
            samples = self.sample(pool.images, self.samples_per_image, generator=generator)
            for share in self._shares(len(pool.images)):
                self._next_step += 1
                if self._next_step > first:
                    yield _take(samples, share)

    def state_dict(self) -> dict[str, int]:
        """Tell the epoch and how many of its steps were taken."""
        return {"epoch": self.epoch, "steps": self._next_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after the steps that were taken, if the same epoch goes on."""
        self.epoch = self._resumed_epoch = state_dict["epoch"]
        self._next_step = state_dict["steps"]

    def _steps(self, images: int) -> int:
        """Tell how many steps a pool is for."""
        full, rest = divmod(images * self.samples_per_image, self.batch_size)
        return full + (rest >= self._world_size)  # of a smaller rest, not every process would get a sample

    def _shares(self, images: int) -> list[slice]:
        """Tell which samples of a pool are this process's, step by step."""
        count = images * self.samples_per_image
        shares = []
        for start in range(0, count, self.batch_size):
            size = (min(start + self.batch_size, count) - start) // self._world_size
            if size > 0:
                shares.append(slice(start + self._rank * size, start + (self._rank + 1) * size))
        return shares

    def _kept_pool(self) -> Iterator[Prepared]:
        if self._kept is None:
            # In an order that does not depend on the epoch, so that a resumed run takes the same samples.
            (self._kept,) = self._pools(self.seed)
        yield self._kept

    def _pools(self, seed: int) -> Iterator[Prepared]:
        if self.images.generator is not None:
            self.images.generator.manual_seed(seed)
        pool: list[Prepared] = []
        for batch in self.images:
            images, names = self.prepare(batch)
            pool.append(Prepared(as_bytes(images), names))
            if sum(len(part.images) for part in pool) >= self._pool_size:
                yield _pooled(pool)
                pool = []
        if pool:
            yield _pooled(pool)


def as_bytes(images: torch.Tensor) -> torch.Tensor:
    """Round images to bytes, as an image file would hold them.

    Args:
        images (torch.Tensor): Images in [0, 1].

    Returns:
        torch.Tensor: The same in 0 .. 255, as ``uint8``.

    Example:
        >>> as_bytes(torch.tensor([0.0, 0.001, 0.5, 1.0]))
        tensor([  0,   0, 128, 255], dtype=torch.uint8)
    """
    return (images * 255).round().to(torch.uint8)


def as_fractions(images: torch.Tensor) -> torch.Tensor:
    """Turn bytes, but not what is in [0, 1] already, into numbers in [0, 1].

    Args:
        images (torch.Tensor): Images, or parts of them.

    Returns:
        torch.Tensor: The same in [0, 1], as float32 where they were bytes.

    Example:
        >>> as_fractions(torch.tensor([0, 51, 255], dtype=torch.uint8))
        tensor([0.0000, 0.2000, 1.0000])
    """
    return images if images.is_floating_point() else images / 255


def _pooled(parts: list[Prepared]) -> Prepared:
    return Prepared(torch.cat([part.images for part in parts]), [name for part in parts for name in part.names])


def _take(samples: _Samples, part: slice) -> _Samples:
    of_each_sample = {
        name: value[part].to(samples.image.device)
        for name, value in vars(samples).items()
        if isinstance(value, torch.Tensor) and name != "image"
    }
    return replace(samples, **of_each_sample)
