# SPDX-License-Identifier: Apache-2.0
"""Masks that end where a defect does, however strong it is."""

import math

import pytest
import torch
from anomalib.data import InferenceBatch
from scipy.ndimage import maximum_filter

from anomalib_intra import UnsaturatedPostProcessor
from anomalib_intra.components.outline import belongs_to_a_peak


@pytest.mark.parametrize("size", [(64, 64), (40, 96), (7, 5), (1, 1)])
def test_highest_values_are_those_of_rectangles_of_a_quarter_of_the_sides(size: tuple[int, int]) -> None:
    maps = torch.rand(3, 1, *size, dtype=torch.float64) ** 4
    reach = [max(1, side // 8) for side in size]
    for of_image, belongs in zip(maps, belongs_to_a_peak(maps), strict=True):
        highest = maximum_filter(of_image[0].numpy(), [2 * side + 1 for side in reach], mode="constant")
        assert torch.equal(belongs[0], of_image[0] >= 0.5 * torch.from_numpy(highest))


@pytest.mark.parametrize("strength", [3.0, 30.0, 3000.0])
def test_the_outline_of_a_defect_does_not_grow_with_its_strength(strength: float) -> None:
    down, right = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    blurred = torch.exp(-((down - 50) ** 2 + (right - 40) ** 2) / (2 * 8**2))
    weak = 2 * torch.exp(-((down - 100) ** 2 + (right - 100) ** 2) / (2 * 8**2))
    post_processor = UnsaturatedPostProcessor()
    post_processor._image_threshold.fill_(1.0)
    post_processor._pixel_threshold.fill_(1.0)
    maps = (strength * blurred + weak)[None, None]
    mask = post_processor(InferenceBatch(pred_score=maps.amax()[None], anomaly_map=maps)).pred_mask[0, 0]
    radius = float(mask[:75].sum() / torch.pi) ** 0.5
    assert radius == pytest.approx(8 * (2 * math.log(2)) ** 0.5, rel=0.05)  # half of the peak
    assert mask[100, 100]  # a weaker defect elsewhere is still outlined
    without = maps[0, 0, :75] > 1
    assert (mask[:75] & ~without).sum() == 0
    if strength > 10:
        assert without.sum() > 2 * mask[:75].sum()  # what the threshold alone calls a defect


def test_a_normal_image_has_no_mask() -> None:
    post_processor = UnsaturatedPostProcessor()
    post_processor._image_threshold.fill_(1.0)
    post_processor._pixel_threshold.fill_(1.0)
    maps = torch.rand(1, 1, 32, 32)
    assert not post_processor(InferenceBatch(pred_score=maps.amax()[None], anomaly_map=maps)).pred_mask.any()
