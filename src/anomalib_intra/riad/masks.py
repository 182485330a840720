# SPDX-License-Identifier: Apache-2.0
"""Which part of an image is hidden when: cells of k x k pixels, shuffled into disjoint sets."""

from collections.abc import Sequence

import torch
from einops import rearrange, repeat

#: Number n of sets, each hidden once.
SETS = 3


def draw_sets(image_size: tuple[int, int], cell_size: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Put each cell of an image into one of the sets at random, so that no set has over one cell more than another.

    The sets are numbers of one map, so that they cannot overlap and no pixel can be left out.

    Args:
        image_size (tuple[int, int]): Height and width of the image in pixels, multiples of ``cell_size``.
        cell_size (int): Side length k of a cell in pixels.
        generator (torch.Generator | None): Source of randomness, on the CPU. Defaults to the global one.

    Returns:
        torch.Tensor: For each pixel the number of its set, in 0 .. 2, shape ``(H, W)``, as ``uint8``.

    Example:
        >>> sets = draw_sets((4, 6), 2, torch.Generator().manual_seed(0))
        >>> sets.shape, sets.unique(return_counts=True)[1]  # 6 cells of 4 pixels
        (torch.Size([4, 6]), tensor([8, 8, 8]))
    """
    rows, columns = (side // cell_size for side in image_size)
    order = torch.randperm(rows * columns, generator=generator, device="cpu")
    of_cells = rearrange((order % SETS).to(torch.uint8), "(n m) -> n m", n=rows)
    return repeat(of_cells, "n m -> (n k1) (m k2)", k1=cell_size, k2=cell_size)


def check_cells(image_size: tuple[int, int], cell_sizes: Sequence[int], stride: int) -> None:
    """Refuse sizes that cells or the U-Net do not divide, or at which a cell can be all there is.

    Args:
        image_size (tuple[int, int]): Height and width of the images in pixels.
        cell_sizes (Sequence[int]): Side lengths k of the cells in pixels.
        stride (int): Pixels of an image to one of the U-Net's coarsest features.

    Raises:
        ValueError: If they do not fit together; names the nearest size that does.

    Example:
        >>> check_cells((250, 256), (2, 4, 8, 16), stride=16)
        Traceback (most recent call last):
        ...
        ValueError: Images of 250 x 256 pixels do not work with cells of 2, 4, 8, 16 pixels: height and width must be \
multiples of 16, at least 32; the nearest size that works is 256 x 256.
    """
    if not cell_sizes or len(set(cell_sizes)) < len(cell_sizes) or any(k < 1 or stride % k for k in cell_sizes):
        msg = f"cell_sizes must be one or more different divisors of {stride}, got {tuple(cell_sizes)}."
        raise ValueError(msg)
    if all(side % stride == 0 and side >= 2 * stride for side in image_size):
        return
    near = [max(2, round(side / stride)) * stride for side in image_size]
    msg = (
        f"Images of {image_size[0]} x {image_size[1]} pixels do not work with cells of "
        f"{', '.join(map(str, cell_sizes))} pixels: height and width must be multiples of {stride}, at least "
        f"{2 * stride}; the nearest size that works is {near[0]} x {near[1]}."
    )
    raise ValueError(msg)
