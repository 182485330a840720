# SPDX-License-Identifier: Apache-2.0
"""Which part of an image file a model sees, to put what it says about that part where it belongs."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import Resize
from torchvision.tv_tensors import Image, Mask


class FileView(NamedTuple):
    """The part of a file that a model sees, in pixels of the file; it may reach beyond the file, as after padding.

    Args:
        top (int): Its first row.
        left (int): Its first column.
        height (int): Its number of rows.
        width (int): Its number of columns.
    """

    top: int
    left: int
    height: int
    width: int

    def area(self, size: tuple[int, int]) -> float:
        """Its area as a share of the file's.

        Args:
            size (tuple[int, int]): Height and width of the file.

        Returns:
            float: The share; more than 1 after padding.

        Example:
            >>> FileView(25, 25, 50, 50).area((100, 100))
            0.25
        """
        return self.height * self.width / (size[0] * size[1])

    def place(self, maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Put maps of the part into maps of the whole file, which are zero where the model saw nothing.

        Args:
            maps (torch.Tensor): Maps of the model's size, shape ``(B, 1, h, w)``.
            size (tuple[int, int]): Height and width of the file.

        Returns:
            torch.Tensor: Maps of shape ``(B, 1, *size)``.

        Example:
            >>> FileView(1, 0, 2, 2).place(torch.ones(1, 1, 4, 4), (4, 3))[0, 0]
            tensor([[0., 0., 0.],
                    [1., 1., 0.],
                    [1., 1., 0.],
                    [0., 0., 0.]])
        """
        part = interpolate(maps, size=(self.height, self.width), mode="bilinear", align_corners=False)
        if self == FileView(0, 0, *size):
            return part
        whole = part.new_zeros(*part.shape[:2], *size)
        top, left = max(self.top, 0), max(self.left, 0)
        bottom, right = min(self.top + self.height, size[0]), min(self.left + self.width, size[1])
        whole[..., top:bottom, left:right] = part[
            ..., top - self.top : bottom - self.top, left - self.left : right - self.left
        ]
        return whole


def file_view(transforms: Iterable[Any], size: tuple[int, int]) -> FileView:
    """Follow what resizes, crops and pads do to the place of pixels.

    Args:
        transforms (Iterable[Any]): What files go through before the model sees them, one after the other.
        size (tuple[int, int]): Height and width of the files.

    Returns:
        FileView: What the model sees.

    Raises:
        ValueError: If one of them moves pixels in another way.

    Example:
        >>> from torchvision.transforms.v2 import CenterCrop
        >>> file_view([Resize((50, 100)), CenterCrop(25)], (100, 100))
        FileView(top=24, left=38, height=50, width=25)
    """
    height, width = size
    top, left, row, column = 0.0, 0.0, 1.0, 1.0  # of the file: where the view begins, and how large its pixels are
    for transform in transforms:
        if isinstance(transform, Resize):
            new_height, new_width = transform(torch.zeros(1, height, width)).shape[-2:]
            row, column = row * height / new_height, column * width / new_width
            height, width = new_height, new_width
        else:
            down, right, height, width = _shift(transform, height, width)
            top, left = top + down * row, left + right * column
    first, last = (round(top), round(left)), (round(top + height * row), round(left + width * column))
    return FileView(*first, last[0] - first[0], last[1] - first[1])


def _shift(transform: Any, height: int, width: int) -> tuple[int, int, int, int]:
    """Rows and columns by which a transform moves pixels up and left, and the size that it leaves."""
    rows, columns = torch.arange(height).float()[:, None], torch.arange(width).float()
    # Counted from 1, since padding is mostly 0. Masks, since these keep their values.
    numbers = torch.stack([rows.expand(height, width), columns.expand(height, width)]) + 1
    try:
        _, moved = transform(Image(torch.zeros(3, height, width)), Mask(numbers))
        moved = torch.as_tensor(moved)
        new_rows, new_columns = (torch.arange(side).float() + 1 for side in moved.shape[-2:])
        shifts = (moved[0] - new_rows[:, None]), (moved[1] - new_columns)
        down, right = (int(shift[moved[0] > 0].mode().values) for shift in shifts)
        alike = float(((shifts[0] == down) & (shifts[1] == right))[moved[0] > 0].float().mean())
    except Exception:  # it is made for other images, or leaves nothing
        alike = 0.0
    if alike < 0.5:  # more than the edges, which padding may repeat
        msg = (
            f"original_size=True needs to know where pixels come from, and {type(transform).__name__} is neither a "
            "resize, a crop nor a pad: set original_size=False."
        )
        raise ValueError(msg)
    return down, right, int(moved.shape[-2]), int(moved.shape[-1])
