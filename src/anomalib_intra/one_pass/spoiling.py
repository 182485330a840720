# SPDX-License-Identifier: Apache-2.0
"""Spoiled training images: parts of irregular shape are replaced, and the clean image is still asked for.

A model that is trained on clean images alone learns to go on with whatever it sees around a hole, a defect included.
Spoiled surroundings teach it not to believe them.
"""

import math

import torch
from torch.nn.functional import avg_pool2d, interpolate

#: Sides, in cells, of the noise that shapes are cut from: few cells give large shapes.
_LARGE, _SMALL, _LINES = (3, 8), (9, 24), (3, 10)
#: Shares of large, small and line-like shapes.
_SHAPES = torch.tensor([0.5, 0.25, 0.25])
#: Shares of what replaces them: another place, another place of a donor, the same place of a donor, a place close by,
#: the same in another light, a plain colour, a pattern.
_FILLINGS = torch.tensor([0.2, 0.1, 0.1, 0.15, 0.15, 0.1, 0.2])
#: How many parts of a spoiled image are replaced, each in another way: on a random texture, only some can be seen.
_FEWEST, _MOST = 1, 5
#: Share of them that are small and lie where there is something to see. Anywhere is mostly background where parts are
#: small, and who learns on that misses what is wrong with the part.
_SMALL_PARTS = 0.6
#: Their radius as a share of the image's shorter side, as a power of e.
_RADIUS = (-4.2, -2.1)
#: Side of the cells that are told apart by how much there is to see, in pixels, and how much a plain one counts, as a
#: share of the mean.
_CELL, _PLAIN = 4, 0.2
#: Share of the colours and patterns that are grey, and of the light that has no tint. Otherwise a strange hue would
#: give them away where parts are grey, and who knows spoiled parts by their hue misses the defects that are as grey.
_GREY = 0.5
#: Cells of a pattern along either side, as powers of 2, and its contrast, as a power of e.
_CELLS, _CONTRAST = (2.0, 6.5), (0.0, 2.5)
#: Farthest that a filling from close by is taken from, in pixels of an image of 256.
_CLOSE_BY = 10


def spoil(images: torch.Tensor, donors: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace parts of images.

    Args:
        images (torch.Tensor): Clean images in [0, 1], shape ``(B, 3, H, W)``.
        donors (torch.Tensor): Other clean images that parts are taken from, of the same shape.
        share (float): Share of the images that are spoiled, in [0, 1].

    Returns:
        tuple[torch.Tensor, torch.Tensor]: Spoiled images, and how much each pixel belongs to what was replaced, in
        [0, 1], shape ``(B, 1, H, W)``: 1 within it, however faint, and less at soft rims.

    Example:
        >>> images, donors = torch.rand(2, 2, 3, 64, 64)
        >>> spoiled, replaced = spoil(images, donors, share=1.0)
        >>> torch.equal(spoiled[:, 0][replaced[:, 0] == 0], images[:, 0][replaced[:, 0] == 0])
        True
    """
    spoiled, replaced = images.clone(), torch.zeros_like(images[:, :1])
    for number, (image, donor) in enumerate(zip(images, donors, strict=True)):
        if torch.rand(()) < share:
            for _ in range(_integer(_FEWEST, _MOST)):
                shape, place = _shape(image.shape[-2:]), None
                if _coin(_SMALL_PARTS):
                    place = _place(image)
                    shape = _part_at(place, shape)
                shape = shape.to(image)
                amount = shape * (_uniform(0.3, 1.0) if _coin(0.4) else 1.0)
                spoiled[number] = torch.lerp(spoiled[number], _filling(image, donor, place), amount).clamp(0, 1)
                replaced[number] = torch.maximum(replaced[number], shape)
    return spoiled, replaced


def _shape(size: torch.Size) -> torch.Tensor:
    """How much each pixel belongs to a part of irregular shape, shape ``(1, H, W)``."""
    kind = int(torch.multinomial(_SHAPES, 1))
    if kind == 0:
        shape = _noise(size, _LARGE) > _uniform(0.8, 1.8)
    elif kind == 1:
        shape = _noise(size, _SMALL) > _uniform(1.5, 2.3)
    else:  # where noise changes its sign there are lines; other noise leaves parts of them
        shape = (_noise(size, _LINES).abs() < _uniform(0.06, 0.18)) & (_noise(size, _LARGE) > 0.6)
    return avg_pool2d(shape.float()[None], 5, stride=1, padding=2)[0] if _coin(0.5) else shape.float()


def _place(image: torch.Tensor) -> tuple[int, int]:
    """Draw a row and a column, the more likely the more there is to see around them."""
    variance = avg_pool2d(image**2, _CELL) - avg_pool2d(image, _CELL) ** 2
    detail = variance.mean(dim=0).clamp(min=0).sqrt().cpu()
    cell = int(torch.multinomial((detail + _PLAIN * detail.mean() + 1e-6).flatten(), 1))
    row, column = divmod(cell, detail.shape[1])
    return _CELL * row + _integer(0, _CELL - 1), _CELL * column + _integer(0, _CELL - 1)


def _part_at(place: tuple[int, int], shape: torch.Tensor) -> torch.Tensor:
    """Cut a small part out of a shape, shifted so that one of its pixels lies at a place."""
    height, width = shape.shape[-2:]
    pixels = (shape[0] > 0.5).nonzero()
    if len(pixels):
        row, column = pixels[_integer(0, len(pixels) - 1)].tolist()
        shape = shape.roll((place[0] - row, place[1] - column), (-2, -1))
    else:
        shape = torch.ones_like(shape)
    rows, columns = torch.meshgrid(torch.arange(height) - place[0], torch.arange(width) - place[1], indexing="ij")
    return shape * (rows**2 + columns**2 < (math.exp(_uniform(*_RADIUS)) * min(height, width)) ** 2)


def _filling(image: torch.Tensor, donor: torch.Tensor, place: tuple[int, int] | None) -> torch.Tensor:
    """What replaces a part of an image, at a place if it is a small one: a whole image of the same shape."""
    kind = int(torch.multinomial(_FILLINGS, 1))
    if kind == 0:
        return _elsewhere(image, place)
    if kind == 1:
        return _elsewhere(donor, place)
    if kind == 2:
        return donor
    if kind == 3:
        farthest = max(2, round(_CLOSE_BY * min(image.shape[-2:]) / 256))
        down, right = (_integer(2, farthest) * (1 if _coin(0.5) else -1) for _ in range(2))
        return image.roll((down, right), (-2, -1))
    # (a grey camera sees no colours)
    colours = 1 if _coin(_GREY) or torch.equal(image, image[:1].expand_as(image)) else len(image)
    if kind == 4:
        contrast, tint = (0.4 * torch.randn(())).exp(), 0.15 * torch.randn(colours, 1, 1)
        return (image - 0.5) * contrast + 0.5 + tint.to(image)
    one, other = torch.rand(2, colours, 1, 1).to(image)
    if kind == 5:
        return one.expand_as(image)
    return torch.lerp(one, other, _pattern(image.shape[-2:]).to(image)).expand_as(image)


def _pattern(size: torch.Size) -> torch.Tensor:
    """Stripes or spots, fine or coarse, faint or sharp, in [0, 1], shape ``(1, H, W)``."""
    rows, columns = (int(2 ** _uniform(*_CELLS)) for _ in range(2))
    noise = interpolate(torch.randn(1, 1, rows, columns), size=size, mode="bicubic", align_corners=False)[0]
    return torch.sigmoid(noise * math.exp(_uniform(*_CONTRAST)))


def _elsewhere(image: torch.Tensor, place: tuple[int, int] | None) -> torch.Tensor:
    """An image flipped, turned and shifted by any distance, or so that something to see comes to a place."""
    height, width = image.shape[-2:]
    image = image.flip(-1) if _coin(0.5) else image
    image = image.mT if height == width and _coin(0.5) else image
    if place is None or _coin(0.3):
        return image.roll((_integer(0, height - 1), _integer(0, width - 1)), (-2, -1))
    source = _place(image)
    return image.roll((place[0] - source[0], place[1] - source[1]), (-2, -1))


def _noise(size: torch.Size, cells: tuple[int, int]) -> torch.Tensor:
    """Smooth noise of mean 0 and about unit variance, shape ``(1, H, W)``."""
    number = _integer(*cells)
    return interpolate(torch.randn(1, 1, number, number), size=size, mode="bicubic", align_corners=False)[0]


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _integer(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def _coin(chance: float) -> bool:
    return bool(torch.rand(()) < chance)
