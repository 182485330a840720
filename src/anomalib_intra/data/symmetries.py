# SPDX-License-Identifier: Apache-2.0
"""Flips and right-angle turns: the eight symmetries of a square, as a transposition followed by flips."""

from dataclasses import dataclass

import torch
from einops import rearrange
from kornia.geometry.transform import hflip, vflip


@dataclass
class Symmetries:
    """Which symmetry is applied to each image of a batch.

    Args:
        transposed (torch.Tensor): Whether it is transposed first, shape ``(B,)``.
        flipped_h (torch.Tensor): Whether it is then flipped left to right, shape ``(B,)``.
        flipped_v (torch.Tensor): Whether it is then flipped top to bottom, shape ``(B,)``.
    """

    transposed: torch.Tensor
    flipped_h: torch.Tensor
    flipped_v: torch.Tensor


def sample_symmetries(count: int, square: bool, augment: bool, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Sample a symmetry for each of several images, all with equal chance.

    Args:
        count (int): Number of images.
        square (bool): Whether they are square. Others are not transposed: a quarter turn would change their shape.
        augment (bool): Without it, all images stay as they are.
        generator (torch.Generator): Source of randomness, on the CPU.

    Returns:
        dict[str, torch.Tensor]: The fields of :class:`Symmetries`.

    Example:
        >>> symmetries = sample_symmetries(100, True, True, torch.Generator().manual_seed(0))
        >>> len({*zip(*(values.tolist() for values in symmetries.values()))})
        8
    """

    def coin(allowed: bool = True) -> torch.Tensor:
        toss = torch.randint(0, 2, (count,), generator=generator).bool()
        return toss if augment and allowed else torch.zeros_like(toss)

    return {"transposed": coin(square), "flipped_h": coin(), "flipped_v": coin()}


def apply_symmetries(images: torch.Tensor, symmetries: Symmetries) -> torch.Tensor:
    """Transpose and flip images.

    Args:
        images (torch.Tensor): Images of shape ``(B, C, H, W)``, square where some are transposed.
        symmetries (Symmetries): What to do with each.

    Returns:
        torch.Tensor: Images of the same shape.

    Example:
        >>> yes, no = torch.tensor([True]), torch.tensor([False])
        >>> apply_symmetries(torch.tensor([[[[1, 2], [3, 4]]]]), Symmetries(yes, yes, no)).flatten()
        tensor([3, 1, 4, 2])
    """

    def where(choice: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
        return torch.where(rearrange(choice, "b -> b 1 1 1"), changed, images)

    if images.shape[-1] == images.shape[-2]:
        images = where(symmetries.transposed, rearrange(images, "b c h w -> b c w h"))
    images = where(symmetries.flipped_h, hflip(images))
    return where(symmetries.flipped_v, vflip(images))
