# SPDX-License-Identifier: Apache-2.0
"""From a loader of images to a loader of training steps, which are random draws from them."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch.utils.data import DataLoader

#: Bytes of decoded images that are drawn from at a time; a usual training set fits at once.
POOL_BYTES = 2**30

#: A dataclass with the images ``image`` and tensors of which each row belongs to one draw, such as ``WindowBatch``.
Draws = TypeVar("Draws")


class DrawLoader:
    """Turns a loader of images into a loader of training steps.

    Every epoch draws from every image equally often and in random order, so that the draws of a step come from many
    images. Images are pooled up to :data:`POOL_BYTES` at a time and read once in an epoch; with ``same_every_epoch``,
    those that fit into one pool are read only once.

    Args:
        images (DataLoader): Loader of image batches. Its ``generator`` is seeded anew for every epoch.
        prepare (Callable): Turns such a batch into a tensor ``(B, 3, H, W)`` in [0, 1] on the model's device.
        draw (Callable): ``draw(images, draws_per_image, generator=...)`` makes that many draws from each of
            ``(P, 3, H, W)`` images, shuffled.
        draws_per_image (int): Draws from each image and epoch.
        batch_size (int): Draws in a step.
        image_size (tuple[int, int]): Height and width of prepared images in pixels.
        seed (int): Seed of all draws; an epoch's draws depend on it and on ``epoch`` alone.
        same_every_epoch (bool): Whether an image is the same each time it is read.
    """

    def __init__(
        self,
        images: DataLoader,
        prepare: Callable[[object], torch.Tensor],
        draw: Callable[..., Draws],
        draws_per_image: int,
        batch_size: int,
        image_size: tuple[int, int],
        seed: int,
        same_every_epoch: bool = False,
    ) -> None:
        self.images = images
        self.prepare = prepare
        self.draw = draw
        self.draws_per_image = draws_per_image
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        bytes_of_one = 3 * image_size[0] * image_size[1] * torch.float32.itemsize
        read_at_once = images.batch_size or 1
        self._pool_size = max(1, POOL_BYTES // (bytes_of_one * read_at_once)) * read_at_once
        self._keeps = same_every_epoch and len(images.dataset) <= self._pool_size
        self._kept: torch.Tensor | None = None

    def __len__(self) -> int:
        """Steps of an epoch."""
        full, rest = divmod(len(self.images.dataset), self._pool_size)
        return full * self._steps(self._pool_size) + self._steps(rest)

    def __iter__(self) -> Iterator[Draws]:
        """Yield the steps of epoch ``epoch``."""
        # Apart enough that the epochs of two seeds do not repeat each other's draws.
        seed = self.seed * 1_000_003 + self.epoch
        generator = torch.Generator().manual_seed(seed)
        for pool in self._kept_pool() if self._keeps else self._pools(seed):
            draws = self.draw(pool, self.draws_per_image, generator=generator)
            for step in range(self._steps(len(pool))):
                yield _take(draws, slice(step * self.batch_size, (step + 1) * self.batch_size))

    def _steps(self, images: int) -> int:
        return math.ceil(images * self.draws_per_image / self.batch_size)

    def _kept_pool(self) -> Iterator[torch.Tensor]:
        if self._kept is None:
            # In an order that does not depend on the epoch, so that a resumed run makes the same draws.
            (self._kept,) = self._pools(self.seed)
        yield self._kept

    def _pools(self, seed: int) -> Iterator[torch.Tensor]:
        if self.images.generator is not None:
            self.images.generator.manual_seed(seed)
        pool: list[torch.Tensor] = []
        for batch in self.images:
            pool.append(self.prepare(batch))
            if sum(map(len, pool)) >= self._pool_size:
                yield torch.cat(pool)
                pool = []
        if pool:
            yield torch.cat(pool)


def _take(draws: Draws, part: slice) -> Draws:
    of_each_draw = {
        name: value[part].to(draws.image.device)
        for name, value in vars(draws).items()
        if isinstance(value, torch.Tensor) and name != "image"
    }
    return replace(draws, **of_each_draw)
