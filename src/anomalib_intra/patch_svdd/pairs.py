# SPDX-License-Identifier: Apache-2.0
"""How training pairs of patches are sampled and cut (sec. 3.1-3.2)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange

from anomalib_intra.data.samples import as_fractions

#: Side lengths K of the patches of both levels in pixels.
SMALL_PATCH, BIG_PATCH = 32, 64

#: The neighbours (dy, dx) that the labels 0 .. 7 of the position task stand for.
DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))

#: Standard deviation of the colour noise of the position task, for images in [0, 1].
NOISE = 0.02


class LevelPairs(NamedTuple):
    """The patch pairs of one level, or their features.

    Args:
        first (torch.Tensor): First patches of the position task, shape ``(B, 3, K, K)``; as features ``(B, D)``.
        second (torch.Tensor): Their neighbours, same shape.
        label (torch.Tensor): Which neighbours they are, as in :data:`DIRECTIONS`, shape ``(B,)``.
        near_first (torch.Tensor): First patches of the SVDD pairs, same shape as ``first``.
        near_second (torch.Tensor): Patches a few pixels next to them, same shape.
    """

    first: torch.Tensor
    second: torch.Tensor
    label: torch.Tensor
    near_first: torch.Tensor
    near_second: torch.Tensor


class Pairs(NamedTuple):
    """The patch pairs of one training step, or their features.

    Args:
        small (LevelPairs): Pairs of small patches.
        big (LevelPairs): Pairs of big patches.
    """

    small: LevelPairs
    big: LevelPairs


@dataclass
class PairBatch:
    """The patch pairs of one training step, still uncut.

    Args:
        image (torch.Tensor): The images they come from, as bytes or in [0, 1], shape ``(P, 3, H, W)``.
        index (torch.Tensor): Which image, shape ``(B,)``.
        small_position (torch.Tensor): Upper left pixel (y, x) of the position task's first small patch, 0-based, shape
            ``(B, 2)``.
        small_label (torch.Tensor): Which of the :data:`DIRECTIONS` its neighbour lies in, shape ``(B,)``.
        small_offset (torch.Tensor): Shift (dy, dx) from the patch to its neighbour, shape ``(B, 2)``.
        small_near_position (torch.Tensor): Upper left pixel of the SVDD pair's first small patch, shape ``(B, 2)``.
        small_near_offset (torch.Tensor): Shift from it to the second, shape ``(B, 2)``.
        big_position (torch.Tensor): The same for big patches, shape ``(B, 2)``.
        big_label (torch.Tensor): Shape ``(B,)``.
        big_offset (torch.Tensor): Shape ``(B, 2)``.
        big_near_position (torch.Tensor): Shape ``(B, 2)``.
        big_near_offset (torch.Tensor): Shape ``(B, 2)``.
    """

    image: torch.Tensor
    index: torch.Tensor
    small_position: torch.Tensor
    small_label: torch.Tensor
    small_offset: torch.Tensor
    small_near_position: torch.Tensor
    small_near_offset: torch.Tensor
    big_position: torch.Tensor
    big_label: torch.Tensor
    big_offset: torch.Tensor
    big_near_position: torch.Tensor
    big_near_offset: torch.Tensor

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.index)


def check_trainable(size: tuple[int, int]) -> None:
    """Refuse images that do not hold two big patches side by side.

    Args:
        size (tuple[int, int]): Height and width in pixels.

    Raises:
        ValueError: If they are too small.

    Example:
        >>> check_trainable((128, 256))
    """
    if min(size) < 2 * BIG_PATCH:
        msg = (
            f"Images of {size[0]} x {size[1]} pixels are too small to train on: height and width must be at least "
            f"{2 * BIG_PATCH}, to hold two patches of {BIG_PATCH} x {BIG_PATCH} side by side."
        )
        raise ValueError(msg)


def sample_pairs(images: torch.Tensor, pairs_per_image: int, generator: torch.Generator) -> PairBatch:
    """Draw random patch pairs of both levels and both tasks from every image, in random order.

    Args:
        images (torch.Tensor): Images, as bytes or in [0, 1], shape ``(P, 3, H, W)``, at least 128 pixels high and wide.
        pairs_per_image (int): Samples from each image; a sample is one pair for each task and level.
        generator (torch.Generator): Source of randomness, on the CPU.

    Returns:
        PairBatch: On the images' device, all ``P * pairs_per_image`` samples.

    Raises:
        ValueError: If the images are too small for two big patches side by side.

    Example:
        >>> samples = sample_pairs(torch.rand(2, 3, 128, 160), 5, torch.Generator().manual_seed(0))
        >>> len(samples), int(samples.small_offset.abs().max()) < 32
        (10, True)
    """
    size = (images.shape[-2], images.shape[-1])
    check_trainable(size)
    count = len(images) * pairs_per_image
    order = torch.randperm(count, generator=generator)
    samples: dict[str, Any] = {"index": order % len(images)}
    for level, patch_size in (("small", SMALL_PATCH), ("big", BIG_PATCH)):
        label, offset = _draw_neighbours(count, patch_size, generator)
        near_offset = _draw_near_offsets(count, patch_size, generator)
        samples |= {
            f"{level}_position": _draw_positions(offset, size, patch_size, generator),
            f"{level}_label": label,
            f"{level}_offset": offset,
            f"{level}_near_position": _draw_positions(near_offset, size, patch_size, generator),
            f"{level}_near_offset": near_offset,
        }
    return PairBatch(image=images, **{name: value.to(images.device) for name, value in samples.items()})


def _draw_neighbours(count: int, patch_size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    label = torch.randint(len(DIRECTIONS), (count,), generator=generator)
    magnitude = torch.randint(3 * patch_size // 4, patch_size, (count, 2), generator=generator)
    return label, torch.tensor(DIRECTIONS)[label] * magnitude


def _draw_near_offsets(count: int, patch_size: int, generator: torch.Generator) -> torch.Tensor:
    reach = patch_size // 16
    side = 2 * reach + 1
    centre = side**2 // 2
    cell = torch.randint(side**2 - 1, (count,), generator=generator)
    cell = torch.where(cell >= centre, cell + 1, cell)
    return torch.stack((cell // side, cell % side), dim=1) - reach


def _draw_positions(
    offset: torch.Tensor, size: tuple[int, int], patch_size: int, generator: torch.Generator
) -> torch.Tensor:
    """Draw the first patches so that they and the patches at ``offset`` lie inside the image."""
    choices = torch.tensor(size) - patch_size - offset.abs() + 1
    chosen = (torch.rand(offset.shape, generator=generator, dtype=torch.float64) * choices).long()
    return chosen + (-offset).clamp(min=0)


def cut_pairs(batch: PairBatch, mean_image: torch.Tensor, noise: float = NOISE) -> Pairs:
    """Cut the patches of a step, on whatever device the images are, and subtract the mean image from them.

    The patches of the position task get colour noise, so that it cannot be solved by colour gradients alone: one shift
    for each patch and channel, and one for each pixel and channel, drawn from torch's global source of randomness.

    Args:
        batch (PairBatch): Images and samples.
        mean_image (torch.Tensor): Mean of the training images, shape ``(3, H, W)``.
        noise (float): Standard deviation of each of the two kinds of noise.

    Returns:
        Pairs: The patches of both levels, ``(B, 3, K, K)`` each, and the labels ``(B,)``.

    Example:
        >>> samples = sample_pairs(torch.rand(2, 3, 128, 160), 5, torch.Generator().manual_seed(0))
        >>> pairs = cut_pairs(samples, torch.zeros(3, 128, 160))
        >>> pairs.small.first.shape, pairs.big.near_second.shape
        (torch.Size([10, 3, 32, 32]), torch.Size([10, 3, 64, 64]))
    """

    def cut(position: torch.Tensor, patch_size: int, noise: float = 0.0) -> torch.Tensor:
        pixel = torch.arange(patch_size, device=batch.image.device)
        y = rearrange(position[:, 0], "b -> b 1 1") + rearrange(pixel, "k -> 1 k 1")
        x = rearrange(position[:, 1], "b -> b 1 1") + rearrange(pixel, "k -> 1 1 k")
        # The mean is cut at the same place, since subtracting it from all images would cost more than the cutting.
        pixels = as_fractions(batch.image[rearrange(batch.index, "b -> b 1 1"), :, y, x])
        patches = pixels - rearrange(mean_image, "c h w -> h w c")[y, x]
        if noise:
            patches = patches + noise * (torch.randn_like(patches[:, :1, :1]) + torch.randn_like(patches))
        return rearrange(patches, "b h w c -> b c h w")

    small_near, big_near = batch.small_near_position, batch.big_near_position
    return Pairs(
        small=LevelPairs(
            first=cut(batch.small_position, SMALL_PATCH, noise),
            second=cut(batch.small_position + batch.small_offset, SMALL_PATCH, noise),
            label=batch.small_label,
            near_first=cut(small_near, SMALL_PATCH),
            near_second=cut(small_near + batch.small_near_offset, SMALL_PATCH),
        ),
        big=LevelPairs(
            first=cut(batch.big_position, BIG_PATCH, noise),
            second=cut(batch.big_position + batch.big_offset, BIG_PATCH, noise),
            label=batch.big_label,
            near_first=cut(big_near, BIG_PATCH),
            near_second=cut(big_near + batch.big_near_offset, BIG_PATCH),
        ),
    )
