# SPDX-License-Identifier: Apache-2.0
"""The inpainting loss (eq. 12) against a loop in float64."""

import pytest
import torch

from anomalib_intra.intra.loss import InpaintingLoss

from ..reference import gms_difference, ssim_difference


def patches_of(batch, side, seed, dtype=torch.float64):
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("side", [5, 8])
@pytest.mark.parametrize(("alpha", "beta"), [(0.01, 0.01), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.3, 2.0)])
def test_loss_is_eq_12_averaged_over_the_batch(side, alpha, beta):
    patches, inpainted = patches_of(3, side, seed=0), patches_of(3, side, seed=1)
    expected = 0.0
    for b in range(3):
        x, y = patches[b].numpy(), inpainted[b].numpy()
        d_g, d_s = gms_difference(x, y).mean(), ssim_difference(x, y).mean()
        expected += (((x - y) ** 2).mean() + alpha * d_g + beta * d_s) / 3
    assert InpaintingLoss(alpha, beta)(patches, inpainted).item() == pytest.approx(expected, rel=0, abs=1e-9)


def test_default_weights_are_those_of_the_paper():
    loss = InpaintingLoss()
    assert (loss.alpha, loss.beta) == (0.01, 0.01)


@pytest.mark.parametrize("side", [5, 8, 16])
def test_terms_are_means_over_pixels_whatever_the_patch_size(side):
    # Between constant patches a and b, L2 is (a - b)^2, the gradient term nothing, and the structural term closed.
    a, b = 0.8, 0.3
    patches = torch.full((2, 3, side, side), a, dtype=torch.float64)
    inpainted = torch.full((2, 3, side, side), b, dtype=torch.float64)
    structural = 1 - (2 * a * b + 0.01**2) / (a**2 + b**2 + 0.01**2)
    assert InpaintingLoss(0, 0)(patches, inpainted).item() == pytest.approx(0.25, abs=1e-12)
    assert InpaintingLoss(1, 0)(patches, inpainted).item() == pytest.approx(0.25, abs=1e-9)
    assert InpaintingLoss(0, 1)(patches, inpainted).item() == pytest.approx(0.25 + structural, abs=1e-8)


def test_alpha_and_beta_act_linearly():
    patches, inpainted = patches_of(2, 6, seed=2), patches_of(2, 6, seed=3)

    def at(alpha, beta):
        return InpaintingLoss(alpha, beta)(patches, inpainted).item()

    l2, d_g, d_s = at(0, 0), at(1, 0) - at(0, 0), at(0, 1) - at(0, 0)
    assert d_g > 0.01
    assert d_s > 0.01
    for alpha, beta in [(0.01, 0.01), (2.0, 0.0), (0.0, 3.0), (0.5, 0.25)]:
        assert at(alpha, beta) == pytest.approx(l2 + alpha * d_g + beta * d_s, rel=0, abs=1e-12)


def test_loss_of_a_perfect_patch_is_zero():
    patches = patches_of(2, 8, seed=4)
    assert abs(InpaintingLoss(1, 1)(patches, patches).item()) < 1e-9


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16 autocast"])
@pytest.mark.parametrize("original", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("inpainted", [0.0, 0.5, 1.0])
def test_gradients_on_constant_patches_are_finite(bf16, original, inpainted):
    patches = torch.full((2, 3, 8, 8), original)
    leaf = torch.full((2, 3, 8, 8), inpainted, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = InpaintingLoss()(patches, leaf.bfloat16() if bf16 else leaf)
        loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert leaf.grad.isfinite().all()
    # What is brighter than the original must get darker, and the other way round.
    if original != inpainted:
        assert (leaf.grad * (inpainted - original) > 0).all()


def test_bf16_predictions_under_autocast_are_compared_in_float32():
    patches = patches_of(2, 8, seed=5, dtype=torch.float32)
    inpainted = patches_of(2, 8, seed=6, dtype=torch.float32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = InpaintingLoss(1, 1)(patches, inpainted)
    assert got.dtype == torch.float32
    assert torch.equal(got, InpaintingLoss(1, 1)(patches, inpainted.float()))


@pytest.mark.parametrize("size", [(4, 4), (4, 8), (8, 4), (1, 1)])
def test_patches_smaller_than_the_ssim_window_are_refused(size):
    patches = torch.rand(1, 3, *size)
    with pytest.raises(ValueError, match=f"at least 5 x 5 pixels, got {size[0]} x {size[1]}.*patch_size"):
        InpaintingLoss()(patches, patches)
