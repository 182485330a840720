# SPDX-License-Identifier: Apache-2.0
"""The three forms of an image that are told apart (sec. 2.1-2.2): normal, CutPaste, CutPaste-scar."""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from kornia.augmentation import ColorJitter, RandomCrop
from torch import nn

#: The forms that the labels 0 .. 2 stand for.
FORMS = ("normal", "CutPaste", "CutPaste-scar")

#: Area of a CutPaste patch as a share of the image's, and its width by its height: either range has half the patches.
AREA, ASPECTS = (0.02, 0.15), ((0.3, 1.0), (1.0, 3.3))

#: Width, length (both in pixels of a 256-pixel image) and angle (in degrees) of a scar.
SCAR_WIDTH, SCAR_LENGTH, SCAR_ANGLE = (2.0, 16.0), (10.0, 25.0), 45.0

#: How much brightness, contrast, saturation and hue change at most.
JITTER = 0.1

#: How far an image is shifted at most, as a share of its side.
SHIFT = 1 / 16


class Boxes(NamedTuple):
    """What is cut out of each image, and where it is pasted.

    Args:
        size (torch.Tensor): Height and width in whole pixels, shape ``(B, 2)``.
        angle (torch.Tensor): Angle by which it is turned, in radians, shape ``(B,)``.
        source (torch.Tensor): Middle (y, x) of what is cut, in pixels from the corner of the image, shape ``(B, 2)``.
        target (torch.Tensor): Middle of where it is pasted, shape ``(B, 2)``.
    """

    size: torch.Tensor
    angle: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor


class ThreeForms(nn.Module):
    """Shows every image in its three forms, with boxes, shifts and colours drawn from torch's global randomness.

    Args:
        image_size (tuple[int, int]): Height and width of the images in pixels.
        patch_size (int | None): Train on random crops of this side length; None trains on whole images, shifted by up
            to :data:`SHIFT` with mirrored borders.

    Example:
        >>> images, labels = ThreeForms((64, 64))(torch.rand(2, 3, 64, 64))
        >>> images.shape, labels
        (torch.Size([6, 3, 64, 64]), tensor([0, 0, 1, 1, 2, 2]))
    """

    def __init__(self, image_size: tuple[int, int], patch_size: int | None = None) -> None:
        super().__init__()
        height, width = image_size
        dy, dx = int(SHIFT * height), int(SHIFT * width)
        # By whole pixels: interpolation would blur what is trained on, but not what is tested.
        self.crop = (
            RandomCrop((height, width), padding=(dx, dy, dx, dy), padding_mode="reflect")
            if patch_size is None
            else RandomCrop((patch_size, patch_size))
        )
        self.jitter = ColorJitter(JITTER, JITTER, JITTER, JITTER)
        # The paper's scars fit into its patches of 32 pixels, where they are as large as in its images of 256.
        self.scale = min(height, width) / 256 if patch_size is None else patch_size / 32

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment images, and spoil each in two ways.

        Args:
            images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: Images in [0, 1] in the order of :data:`FORMS`, shape
            ``(3 * B, 3, H, W)`` or, of crops, ``(3 * B, 3, K, K)``; and the number of each one's form, ``(3 * B,)``.
        """
        images = self.jitter(self.crop(images))
        count, size = len(images), (images.shape[-2], images.shape[-1])
        forms = [images, *(paste(images, self.jitter(images), draw(count, size)) for draw in (patches, self._scars))]
        return torch.cat(forms), torch.arange(len(FORMS), device=images.device).repeat_interleave(count)

    def _scars(self, count: int, size: tuple[int, int]) -> Boxes:
        return scars(count, size, self.scale)


def patches(count: int, size: tuple[int, int]) -> Boxes:
    """Draw the boxes of CutPaste: upright, small and large, wide and high.

    Args:
        count (int): Number of boxes B.
        size (tuple[int, int]): Height and width of the images in pixels.

    Returns:
        Boxes: On the CPU. What does not fit into an image that is not square is as long as that.

    Example:
        >>> boxes = patches(100, (64, 64))
        >>> area = boxes.size.prod(dim=1) / 64**2
        >>> bool(area.min() > 0.01), bool(area.max() < 0.17)
        (True, True)
    """
    area = _uniform(count, *AREA) * size[0] * size[1]
    low, high = (_uniform(count, *aspects) for aspects in ASPECTS)
    aspect = torch.where(torch.rand(count) < 0.5, low, high)
    sides = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], dim=1)
    return _placed(sides.round().clamp(min=1).minimum(torch.tensor(size)), torch.zeros(count), size)


def scars(count: int, size: tuple[int, int], scale: float = 1.0) -> Boxes:
    """Draw the boxes of CutPaste-scar: thin, and turned when they are pasted.

    Args:
        count (int): Number of boxes B.
        size (tuple[int, int]): Height and width of the images in pixels.
        scale (float): What the sizes for images of 256 pixels are multiplied by.

    Returns:
        Boxes: On the CPU, at least a pixel wide.

    Example:
        >>> boxes = scars(100, (256, 256))
        >>> bool((boxes.size[:, 1] <= 16).all()), bool((boxes.angle.abs() <= 0.7854).all())
        (True, True)
    """
    sides = torch.stack([_uniform(count, *SCAR_LENGTH), _uniform(count, *SCAR_WIDTH)], dim=1) * scale
    return _placed(sides.round().clamp(min=1), _uniform(count, -1, 1) * math.radians(SCAR_ANGLE), size)


def _placed(sides: torch.Tensor, angle: torch.Tensor, size: tuple[int, int]) -> Boxes:
    """Cut anywhere, and paste wherever the turned box lies inside the image."""
    reach = (angle.cos().abs()[:, None] * sides + angle.sin().abs()[:, None] * sides.flip(1)).ceil()
    source, target = (
        (torch.rand_like(sides) * (torch.tensor(size) - extent + 1)).floor() + extent / 2 for extent in (sides, reach)
    )
    return Boxes(sides, angle, source, target)


def paste(images: torch.Tensor, others: torch.Tensor, boxes: Boxes) -> torch.Tensor:
    """Paste boxes of other images; their pixels stay as they are, also where they are turned (nearest neighbour).

    Args:
        images (torch.Tensor): Images to paste into, shape ``(B, 3, H, W)``.
        others (torch.Tensor): Images to cut out of, same shape.
        boxes (Boxes): What is cut, and where it is pasted.

    Returns:
        torch.Tensor: Images of the same shape.

    Example:
        >>> box = Boxes(*(torch.tensor([x]) for x in ((1.0, 2.0), 0.0, (0.5, 1.0), (1.5, 2.0))))
        >>> paste(torch.zeros(1, 1, 2, 3), torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]]), box)
        tensor([[[[0., 0., 0.],
                  [0., 1., 2.]]]])
    """
    height, width = images.shape[-2:]
    boxes = Boxes(*(value.to(images.device) for value in boxes))
    # From the middle of the target to each pixel, shape (B, H, 1) and (B, 1, W); then in the box's own frame.
    dy = (torch.arange(height, device=images.device) + 0.5 - boxes.target[:, :1])[:, :, None]
    dx = (torch.arange(width, device=images.device) + 0.5 - boxes.target[:, 1:])[:, None, :]
    cos, sin = boxes.angle.cos()[:, None, None], boxes.angle.sin()[:, None, None]
    y, x = cos * dy - sin * dx, sin * dy + cos * dx
    inside = (y.abs() < boxes.size[:, 0, None, None] / 2) & (x.abs() < boxes.size[:, 1, None, None] / 2)
    row = (boxes.source[:, 0, None, None] + y).floor().long().clamp(0, height - 1)
    column = (boxes.source[:, 1, None, None] + x).floor().long().clamp(0, width - 1)
    image = torch.arange(len(images), device=images.device)[:, None, None]
    cut = rearrange(others[image, :, row, column], "b h w c -> b c h w")
    return torch.where(inside[:, None], cut, images)


def _uniform(count: int, low: float, high: float) -> torch.Tensor:
    return low + (high - low) * torch.rand(count)
