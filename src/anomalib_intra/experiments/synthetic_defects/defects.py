# SPDX-License-Identifier: Apache-2.0
"""Synthetic defects for normal images, of several kinds, each with its mask.

None is made as the one-pass model spoils its training images, or a model would be good at what it was trained on.
"""

import math
from collections.abc import Callable

import torch
from anomalib.data.utils.generators import PerlinAnomalyGenerator
from kornia.filters import box_blur, gaussian_blur2d
from kornia.geometry.transform import elastic_transform2d, rotate

#: A pixel is part of a defect if some channel of it has changed by more than this.
_VISIBLE = 0.03
#: A defect has at least this share of the image's pixels.
_SMALLEST = 2e-4
_TRIES = 50


def add_defect(image: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Give a normal image a defect, drawn by torch's global random numbers.

    Args:
        image (torch.Tensor): Image in [0, 1], shape ``(3, H, W)``.
        kind (str): One of :data:`KINDS`.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: The image with the defect, and its mask of shape ``(H, W)``.

    Raises:
        ValueError: If no defect of the kind can be seen in the image.

    Example:
        >>> image, mask = add_defect(torch.rand(3, 64, 64), "missing")
        >>> image.shape, mask.shape
        (torch.Size([3, 64, 64]), torch.Size([64, 64]))
    """
    for _ in range(_TRIES):
        changed = KINDS[kind](image).clamp(0, 1)
        mask = (changed - image).abs().amax(dim=0) > _VISIBLE
        if mask.float().mean() > _SMALLEST:
            return changed, mask
    msg = f"A defect of the kind {kind} cannot be seen in this image: it is too plain."
    raise ValueError(msg)


def _texture(image: torch.Tensor) -> torch.Tensor:
    """Large and small stains of another texture: anomalib's generator, as DRAEM has it."""
    changed: torch.Tensor = PerlinAnomalyGenerator(probability=1.0)(image)[0]
    return changed


def _paste(image: torch.Tensor) -> torch.Tensor:
    """A rectangle from another place, turned (CutPaste)."""
    height, width = image.shape[-2:]
    other = image.roll((_integer(height), _integer(width)), (-2, -1))
    turned = rotate(other[None], 360 * torch.rand(1), padding_mode="reflection")[0]
    along, across = _place(image, (0.04, 0.2), (0.3, 1.0))
    return torch.where((along.abs() < 1) & (across.abs() < 1), turned, image)


def _scratch(image: torch.Tensor) -> torch.Tensor:
    """A thin bright or dark line."""
    return _lightened(image, *_place(image, (0.05, 0.25), (0.03, 0.08)))


def _stain(image: torch.Tensor) -> torch.Tensor:
    """A bright or dark spot that fades out."""
    along, across = _place(image, (0.02, 0.12), (0.4, 1.0))
    return _lightened(image, 0.7 * along, 0.7 * across)


def _missing(image: torch.Tensor) -> torch.Tensor:
    """A part gone: nothing but the mean colour of its surroundings."""
    side = min(image.shape[-2:]) // 4 * 2 + 1
    return torch.lerp(image, box_blur(image[None], side)[0], _ellipse(*_place(image, (0.03, 0.2), (0.3, 1.0))))


def _bent(image: torch.Tensor) -> torch.Tensor:
    """A part bent: shifted the more, the nearer to the middle of the defect."""
    reach = 0.02 + 0.06 * torch.rand(())
    angle = 2 * math.pi * torch.rand(())
    amount = _ellipse(0.5 * (place := _place(image, (0.05, 0.2), (0.4, 1.0)))[0], 0.5 * place[1])
    shift = 2 * reach * torch.stack([angle.cos(), angle.sin()])[:, None, None] * amount
    # (of a noise that is no noise: the shift itself)
    return elastic_transform2d(image[None], shift[None], (1, 1), (1.0, 1.0), (1.0, 1.0), padding_mode="border")[0]


#: Kinds of defects.
KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "texture": _texture,
    "paste": _paste,
    "scratch": _scratch,
    "stain": _stain,
    "missing": _missing,
    "bent": _bent,
}


def _lightened(image: torch.Tensor, along: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
    sign = 1 if torch.rand(()) < 0.5 else -1
    return image + sign * (0.1 + 0.4 * torch.rand(())) * _ellipse(along, across)


def _place(
    image: torch.Tensor, lengths: tuple[float, float], aspects: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw where a defect lies, where there is something to see rather than on a plain background.

    Args:
        image (torch.Tensor): Image, shape ``(3, H, W)``.
        lengths (tuple[float, float]): Half the length of the defect at least and at most, as shares of the image's
            shorter side.
        aspects (tuple[float, float]): Its width by its length, at least and at most.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: Coordinates along and across the defect, 0 in its middle and 1 at its end,
        each of shape ``(H, W)``.
    """
    grey = image.mean(dim=0, keepdim=True)[None]
    contrast = gaussian_blur2d((grey - gaussian_blur2d(grey, (15, 15), (4.0, 4.0))).abs(), (15, 15), (4.0, 4.0))[0, 0]
    weights = contrast + 0.2 * contrast.mean() + 1e-6
    # (multinomial takes no more categories than 2 ** 24)
    row = int(torch.multinomial(weights.sum(dim=1), 1))
    column = int(torch.multinomial(weights[row], 1))
    rows, columns = (torch.arange(size).float() for size in image.shape[-2:])
    down, right = torch.meshgrid(rows - row, columns - column, indexing="ij")
    angle = 2 * math.pi * torch.rand(())
    low, high = (math.log(length) for length in lengths)
    length = math.exp(low + (high - low) * float(torch.rand(()))) * min(image.shape[-2:])
    width = length * (aspects[0] + (aspects[1] - aspects[0]) * float(torch.rand(())))
    along = (down * angle.cos() + right * angle.sin()) / length
    across = (right * angle.cos() - down * angle.sin()) / max(1.0, width)
    return along, across


def _ellipse(along: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
    """1 in the middle, a half at the rim, 0 outside."""
    return torch.sigmoid(6 * (1 - along**2 - across**2))


def _integer(end: int) -> int:
    return int(torch.randint(end, ()))
