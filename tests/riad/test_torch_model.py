# SPDX-License-Identifier: Apache-2.0
"""Masks, inpainting, loss and map of RIAD, against plain loops and by what they must not do."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import Conv2dNormActivation

from anomalib_intra.riad.loss import RIADLoss
from anomalib_intra.riad.masks import draw_sets
from anomalib_intra.riad.msgms import msgms_map
from anomalib_intra.riad.torch_model import RIADModel

from .reference import reference_inpainting, reference_loss, reference_map

SIZE = (32, 48)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module")
def model():
    """A small model in float64, whose batch norms have seen something."""
    torch.manual_seed(0)
    model = RIADModel(SIZE, width=4).double()
    for seed in range(3):
        model.unet(rand(4, 3, *SIZE, seed=seed))
    return model.eval()


# ---- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 4, 8, 16])
def test_each_pixel_is_hidden_in_exactly_one_set_together_with_its_cell(model, k):
    seen = []
    with model.unet.register_forward_pre_hook(lambda _, args: seen.extend(args)):
        model.inpaint(torch.ones(1, 3, *SIZE, dtype=torch.float64), model.sets[model.cell_sizes.index(k)][None])
    hidden = torch.cat(seen) == 0
    assert hidden.shape == (3, 3, *SIZE)
    assert torch.equal(hidden.sum(dim=0), torch.ones(3, *SIZE, dtype=torch.long))
    cells = hidden.unflatten(-1, (-1, k)).unflatten(2, (-1, k))
    assert torch.equal(cells.all(dim=(3, 5)), cells.any(dim=(3, 5)))
    per_set = cells.any(dim=(3, 5))[:, 0].sum(dim=(1, 2))
    assert per_set.max() - per_set.min() <= 1


def test_cells_are_shuffled_and_each_as_likely_in_each_set():
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([draw_sets((4, 6), 2, generator)[::2, ::2] for _ in range(600)])
    for number in range(3):
        # 200 expected of each cell, with a standard deviation of 12.
        assert ((draws == number).sum(dim=0) - 200).abs().max() < 48
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 90  # 6! / 2!^3 ways of dividing six cells


def test_the_masks_of_inference_are_those_of_any_other_model_whatever_the_global_seed():
    torch.manual_seed(1)
    one = RIADModel(SIZE, width=1)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(RIADModel(SIZE, width=1).sets, one.sets)
    assert not torch.equal(state, torch.get_rng_state())  # of the weights
    assert "sets" in one.state_dict()
    assert len({one.sets[n].numpy().tobytes() for n in range(4)}) == 4


# ---- inpainting ------------------------------------------------------------------------------------------------------


def test_inpainting_is_that_of_the_loops(model):
    image = rand(2, 3, *SIZE, seed=4)
    _, inpainted = model(image)
    assert inpainted.shape == (2, 4, 3, *SIZE)
    for number, sets in enumerate(model.sets.numpy()):
        expected = reference_inpainting(model, image[1].numpy(), sets)
        np.testing.assert_allclose(inpainted[1, number].detach().numpy(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.inpaint(image, model.sets), inpainted)  # as an exported model does it
    assert inpainted.min() > 0
    assert inpainted.max() < 1


@pytest.mark.parametrize("number", range(4))
def test_what_is_hidden_changes_nothing_of_what_is_painted_in_its_place(model, number):
    image, sets = rand(1, 3, *SIZE, seed=5), model.sets[number]
    before = model.inpaint(image, sets[None])
    for hidden in range(3):
        after = model.inpaint(torch.where(sets == hidden, 1 - image, image), sets[None])
        assert torch.equal(before[..., sets == hidden], after[..., sets == hidden])
        assert not torch.equal(before[..., sets != hidden], after[..., sets != hidden])


def test_one_channel_is_taken_as_three_equal_ones(model):
    grey = rand(2, 1, *SIZE, seed=6)
    assert torch.equal(model(grey).inpainted, model(grey.expand(-1, 3, -1, -1)).inpainted)


def test_of_a_trained_model_nothing_stays_when_weights_are_drawn_anew():
    used, fresh = RIADModel(SIZE, width=2), RIADModel(SIZE, width=2)
    used(rand(2, 3, *SIZE, dtype=torch.float32))  # batch norm takes note
    with torch.no_grad():
        for parameter in used.parameters():
            parameter.add_(1)
    for model in (used, fresh):
        torch.manual_seed(3)
        model.reset_parameters()
    for name, value in fresh.state_dict().items():
        assert torch.equal(used.state_dict()[name], value), name


def test_the_network_has_the_channels_of_the_paper():
    with torch.device("meta"):
        unet = RIADModel().unet
    channels = [block[-1][0].out_channels for block in unet.down]
    assert channels == [64, 128, 256, 512, 512]
    assert [block[0][0].stride for block in unet.down] == [(1, 1), *[(2, 2)] * 4]
    # Each stage up joins its own channels with as many that skipped the coarser ones.
    joined = [(block.upsample.out_channels, block.join[0][0].in_channels) for block in unet.up]
    assert joined == [(512, 1024), (256, 512), (128, 256), (64, 128)]
    blocks = [layer for layer in unet.modules() if isinstance(layer, Conv2dNormActivation)]
    assert len(blocks) == 18
    assert all([type(part) for part in block] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] for block in blocks)


# ---- loss and map ----------------------------------------------------------------------------------------------------


def test_loss_is_that_of_the_loops():
    images, inpainted = rand(2, 2, 3, 16, 24, seed=7)
    expected = np.mean([reference_loss(a.numpy(), b.numpy()) for a, b in zip(images, inpainted, strict=True)])
    assert float(RIADLoss()(images, inpainted)) == pytest.approx(expected, rel=1e-6)


def test_map_is_that_of_the_loops():
    images, inpainted = rand(2, 2, 3, 32, 40, seed=8)
    got = msgms_map(images, inpainted)
    for n in range(2):
        np.testing.assert_allclose(got[n, 0].numpy(), reference_map(images[n].numpy(), inpainted[n].numpy()), atol=1e-6)


def test_the_map_of_a_difference_lies_where_it_is():
    images = torch.full((1, 3, 64, 96), 0.5, dtype=torch.float64)
    spot = images.clone()
    spot[..., 30:34, 46:50] = 0.9
    difference = msgms_map(images, spot)[0, 0]
    torch.testing.assert_close(difference, difference.flip(0))
    torch.testing.assert_close(difference, difference.flip(1))
    assert difference.max() > 0.05


def test_gradients_are_finite_on_flat_images_and_for_flat_reconstructions(model):
    for value in (0.0, 0.5, 1.0):
        images = torch.full((2, 3, *SIZE), value, dtype=torch.float64)
        painted = images.clone().requires_grad_()
        RIADLoss()(images, painted).backward()
        assert painted.grad.isfinite().all()
        training = copy.deepcopy(model).train()
        loss = RIADLoss()(images, training.inpaint(images, training.sets[:1])[:, 0])
        loss.backward()
        assert loss.isfinite()
        assert all(weight.grad.isfinite().all() for weight in training.parameters())


# ---- what goes in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "works"), [((250, 256), (256, 256)), ((40, 48), (32, 48)), ((16, 64), (32, 64)), ((8, 8), (32, 32))]
)
def test_sizes_that_do_not_work_are_refused_and_the_nearest_that_works_is_named(size, works):
    with pytest.raises(ValueError, match=rf"multiples of 16.*nearest size that works is {works[0]} x {works[1]}\."):
        RIADModel(size, width=1)
    RIADModel(works, width=1)


@pytest.mark.parametrize("cell_sizes", [(), (4, 4), (0,), (3,), (2, 32)])
def test_cells_that_do_not_work_are_refused(cell_sizes):
    with pytest.raises(ValueError, match="different divisors of 16"):
        RIADModel(SIZE, cell_sizes, width=1)


def test_images_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match=r"48 x 32 pixels reached.*32 x 48: resize"):
        model(rand(1, 3, 48, 32))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\) or \(B, 1, H, W\)"):
        model(rand(1, 2, *SIZE))
    for value, message in ((math.nan, "NaN"), (1.1, "Normalize"), (-1.0, "Normalize")):
        images = rand(1, 3, *SIZE)
        images[0, 1, 3, 4] = value
        with pytest.raises(ValueError, match=message):
            model(images)
