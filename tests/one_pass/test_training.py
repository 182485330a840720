# SPDX-License-Identifier: Apache-2.0
"""What the one-pass model is trained on, and what it is asked for."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from anomalib_intra.one_pass.augmentation import turn, vary_light
from anomalib_intra.one_pass.loss import PaintingLoss
from anomalib_intra.one_pass.optimizer import one_cycle
from anomalib_intra.one_pass.spoiling import spoil

from ..reference import gms_difference, halved, ssim_difference

# ---- spoiled images --------------------------------------------------------------------------------------------------


def pair(size=(64, 64), grey=False, seed=0):
    images, donors = torch.rand(2, 200, 1 if grey else 3, *size, generator=torch.Generator().manual_seed(seed))
    return images.expand(-1, 3, -1, -1), donors.expand(-1, 3, -1, -1)


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_only_what_is_said_to_be_replaced_changes(size):
    torch.manual_seed(0)
    images, donors = pair(size)
    kept = images.clone()
    spoiled, replaced = spoil(images, donors, share=1.0)
    assert torch.equal(images, kept)
    assert replaced.shape == (200, 1, *size)
    assert (replaced >= 0).all()
    assert (replaced <= 1).all()
    assert (spoiled >= 0).all()
    assert (spoiled <= 1).all()
    unchanged = (replaced == 0).expand_as(images)
    assert torch.equal(spoiled[unchanged], images[unchanged])
    changed = replaced.flatten(1).any(dim=1)
    assert changed.float().mean() > 0.8  # few shapes come out empty
    assert (replaced > 0).float().mean() < 0.3  # most of an image stays, so that there is something to paint from
    assert not torch.isclose(spoiled[changed], images[changed]).flatten(1).all(dim=1).any()


def test_small_parts_lie_where_there_is_something_to_see():
    """Most of an image of a screw is a plain background, where nobody learns what is wrong with a thread."""
    torch.manual_seed(0)
    images = torch.full((400, 3, 64, 64), 0.5)
    images[..., 8:24, 40:56] = torch.rand(400, 1, 16, 16)
    _, replaced = spoil(images, images, share=1.0)
    density = (replaced > 0).float().mean(dim=(0, 1))
    assert density[8:24, 40:56].mean() > 2 * density[40:56, 8:24].mean()
    assert density.min() > 0.01  # and some lie anywhere


def test_as_many_images_are_spoiled_as_asked_for():
    torch.manual_seed(0)
    images, donors = pair((32, 32))
    assert torch.equal(spoil(images, donors, share=0.0)[0], images)
    share = spoil(images, donors, share=0.5)[1].flatten(1).any(dim=1).float().mean()
    assert 0.3 < share < 0.6


def test_grey_images_stay_grey():
    torch.manual_seed(0)
    spoiled, _ = spoil(*pair(grey=True), share=1.0)
    assert torch.equal(spoiled, spoiled[:, :1].expand_as(spoiled))
    coloured, _ = spoil(*pair(), share=1.0)
    assert not torch.equal(coloured, coloured[:, :1].expand_as(coloured))


def test_what_is_spoiled_on_colour_images_is_often_as_grey_as_they_are():
    """Grey parts before a colour camera, whose noise has a hue: who knows defects by their hue misses grey ones."""
    torch.manual_seed(0)
    grey = torch.rand(300, 1, 32, 32) * 0.2 + 0.4
    images = (grey + 0.01 * torch.rand(300, 3, 32, 32)).clamp(0, 1)
    spoiled, _ = spoil(images, images, share=1.0)
    hue = (spoiled.amax(dim=1) - spoiled.amin(dim=1)).flatten(1).amax(dim=1)
    changed = (spoiled - images).abs().amax(dim=1).flatten(1).amax(dim=1) > 0.3
    is_grey = hue < 0.03
    assert 0.2 < is_grey[changed].float().mean() < 0.8


def test_a_faint_part_belongs_to_what_was_replaced_as_much_as_a_strong_one():
    torch.manual_seed(0)
    images, donors = torch.zeros(60, 3, 128, 128), torch.ones(60, 3, 128, 128)  # (of a smaller part, most is its rim)
    spoiled, replaced = spoil(images, donors, share=1.0)
    faint = ((spoiled > 0) & (spoiled < 0.9)).any(dim=1, keepdim=True)
    assert (replaced[faint] == 1).float().mean() > 0.3


def test_parts_come_from_the_image_itself_and_from_the_donor():
    torch.manual_seed(0)
    images, donors = torch.zeros(300, 3, 32, 32), torch.full((300, 3, 32, 32), 0.5)
    images[..., :16] = 0.25
    spoiled, replaced = spoil(images, donors, share=1.0)
    whole = (replaced == 1).expand_as(spoiled)
    found = spoiled[whole].unique()
    for value in (0.0, 0.25, 0.5):
        assert (found == value).any(), value
    assert len(found) > 10  # colours and other light


# ---- light, angles, learning rate ------------------------------------------------------------------------------------


def test_light_differs_from_image_to_image_and_within_bounds():
    torch.manual_seed(0)
    lit = vary_light(torch.full((500, 3, 4, 4), 0.5))
    assert lit.std(dim=(1, 2, 3)).max() < 1e-6
    values = lit[:, 0, 0, 0]
    assert 0.04 < values.std() < 0.06  # 0.5 * 0.1, and an offset of 0.02
    assert values.min() >= 0.5 * math.exp(-0.2) - 0.04
    assert values.max() <= 0.5 * math.exp(0.2) + 0.04


def test_turned_images_hold_the_same_values_at_other_places():
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 33), torch.linspace(-1, 1, 33), indexing="ij")
    radius = (x**2 + y**2).sqrt()
    symmetric = (0.5 + 0.4 * torch.cos(3 * radius)).expand(4, 3, 33, 33)
    inside = radius < 0.9
    assert (turn(symmetric) - symmetric)[..., inside].abs().max() < 0.02  # a turn of what looks alike from all sides
    slope = ((x + 1) / 2).expand(4, 3, 33, 33)
    assert (turn(slope) - slope).abs().amax(dim=(1, 2, 3)).min() > 0.05


def test_one_cycle_rises_once_and_falls_once():
    rates = [one_cycle(step / 1000) for step in range(1001)]
    peak = int(np.argmax(rates))
    assert rates[peak] == pytest.approx(1.0)
    assert peak == 10
    assert all(a <= b for a, b in pairwise(rates[: peak + 1]))
    assert all(a >= b for a, b in pairwise(rates[peak:]))
    assert min(rates) >= 0.01 - 1e-12


# ---- the loss, against plain loops -----------------------------------------------------------------------------------


def test_loss_is_equation_12_at_the_scales_of_equation_16():
    image, painted = torch.rand(2, 3, 24, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = image.numpy(), painted.numpy()
    a2, b2 = halved(a), halved(b)
    d_g = gms_difference(a2, b2).mean() + gms_difference(halved(a2), halved(b2)).mean()
    expected = ((a - b) ** 2).mean() + 0.3 * d_g + 0.2 * ssim_difference(a2, b2).mean()
    got = PaintingLoss(alpha=0.3, beta=0.2)(image[None], painted[None])
    assert float(got) == pytest.approx(expected, rel=1e-6)
