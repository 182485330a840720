# SPDX-License-Identifier: Apache-2.0
"""Masks that fit: near a strong defect, a map exceeds the threshold where nothing is wrong. Pure torch."""

import torch
from torch.nn.functional import max_pool2d

#: What belongs to a defect has this share of the highest value nearby: within this share of the image's sides.
_SHARE_OF_THE_HIGHEST, _NEARBY = 0.5, 1 / 8


def belongs_to_a_peak(maps: torch.Tensor) -> torch.Tensor:
    """Tell the pixels that have at least half of the highest value within an eighth of the image's sides.

    Maps are smooth: around a defect that is ten times as strong as the threshold asks for, they exceed it far beyond
    the defect. Half of the peak is where the defect ends, however strong it is; a weaker defect elsewhere keeps a peak
    of its own.

    Args:
        maps (torch.Tensor): Raw anomaly maps, not negative, shape ``(B, 1, H, W)``.

    Returns:
        torch.Tensor: Booleans of the same shape.

    Example:
        >>> maps = torch.tensor([2.0, 4, 5, 9, 5, 4, 3, 2, 1, 1, 1, 1, 1, 2, 3, 2]).view(1, 1, 1, 16)
        >>> belongs_to_a_peak(maps).flatten().int().tolist()
        [0, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1]
    """
    down, right = (max(1, int(side * _NEARBY)) for side in maps.shape[-2:])
    # A maximum of columns of maxima of rows is that of squares, at a fraction of the work.
    highest = max_pool2d(maps, (1, 2 * right + 1), stride=1, padding=(0, right))
    highest = max_pool2d(highest, (2 * down + 1, 1), stride=1, padding=(down, 0))
    return maps >= _SHARE_OF_THE_HIGHEST * highest
