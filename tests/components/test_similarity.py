# SPDX-License-Identifier: Apache-2.0
"""Gradient magnitude (eq. 11) and structural similarity differences against float64 loops."""

import numpy as np
import pytest
import torch

from anomalib_intra.components.similarity import gms_difference, gradient_magnitude, ssim_difference

from .. import reference

SHAPES = [(1, 3, 6, 6), (2, 3, 5, 8), (1, 3, 9, 5), (1, 1, 7, 7)]


def images_of(shape, seed, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_magnitude_is_prewitt_over_3_with_replicated_borders(shape):
    images = images_of(shape, seed=0)
    got = gradient_magnitude(images).numpy()
    assert got.shape == shape
    for b in range(shape[0]):
        for c in range(shape[1]):
            np.testing.assert_allclose(got[b, c], reference.gradient(images[b, c].numpy()), rtol=0, atol=1e-7)


def test_gradient_magnitude_of_float64_images_has_the_precision_of_float64():
    # The epsilon in the root moves a gradient g by 1e-12 / 2 g; the smallest g here is about 0.03. A Prewitt kernel
    # that was divided by 3 in float32 moves it by 1e-8.
    images = images_of(SHAPES[0], seed=0)
    for c in range(3):
        expected = reference.gradient(images[0, c].numpy())
        np.testing.assert_allclose(gradient_magnitude(images)[0, c].numpy(), expected, rtol=0, atol=1e-10)


def test_gradient_magnitude_of_a_ramp_is_its_slope_and_half_of_it_at_the_border_it_runs_into():
    ramp = (torch.arange(6.0, dtype=torch.float64) / 10).expand(1, 1, 4, 6)
    expected = torch.tensor([0.1, 0.2, 0.2, 0.2, 0.2, 0.1], dtype=torch.float64).expand(1, 1, 4, 6)
    torch.testing.assert_close(gradient_magnitude(ramp), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(gradient_magnitude(ramp.mT), expected.mT, rtol=0, atol=1e-7)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_gradient_magnitude_of_a_constant_image_is_zero_up_to_the_border(value):
    assert gradient_magnitude(torch.full((1, 3, 5, 7), value)).max() <= 1.1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-6)])
def test_gms_difference_is_eq_11(shape, dtype, tolerance):
    images, others = images_of(shape, 1, dtype), images_of(shape, 2, dtype)
    got = gms_difference(images, others)
    assert got.dtype == dtype
    assert got.shape == (shape[0], 1, *shape[2:])
    for b in range(shape[0]):
        expected = reference.gms_difference(images[b].numpy(), others[b].numpy())
        np.testing.assert_allclose(got[b, 0].numpy(), expected, rtol=0, atol=tolerance)


def test_gms_difference_is_eq_11_where_gradients_are_as_small_as_its_constant():
    # Gradients of 0.05 squared are about c = 170 / 255^2 = 0.0026, so that another constant would show.
    images, others = (0.5 + 0.1 * (images_of((1, 3, 6, 6), seed) - 0.5) for seed in (3, 4))
    got = gms_difference(images, others)[0, 0].numpy()
    np.testing.assert_allclose(got, reference.gms_difference(images[0].numpy(), others[0].numpy()), rtol=0, atol=1e-7)


def test_gms_difference_is_taken_per_channel_and_not_of_a_grey_image():
    # Red rises where green falls: grey is flat, but the gradients of the channels are not.
    ramp = torch.linspace(0, 1, 6, dtype=torch.float64).expand(6, 6)
    image = torch.stack([ramp, 1 - ramp, torch.zeros_like(ramp)])[None]
    flat = image.mean(dim=1, keepdim=True).expand(1, 3, 6, 6)
    expected = reference.gms_difference(image[0].numpy(), flat[0].numpy())
    assert expected.min() > 0.1
    # The gradient of the flat image is the root of epsilon, 1e-6, where the reference has 0.
    np.testing.assert_allclose(gms_difference(image, flat)[0, 0].numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_ssim_difference_equals_loops_over_the_valid_area(shape, dtype, tolerance):
    images = images_of(shape, 5, dtype)
    others = (0.7 * images + 0.3 * images_of(shape, 6, dtype)).to(dtype)
    got = ssim_difference(images, others)
    assert got.dtype == dtype
    assert got.shape == (shape[0], 1, shape[2] - 4, shape[3] - 4)
    for b in range(shape[0]):
        expected = reference.ssim_difference(images[b].numpy(), others[b].numpy())
        np.testing.assert_allclose(got[b, 0].numpy(), expected, rtol=0, atol=tolerance)


def test_ssim_difference_of_dark_low_contrast_images_shows_both_constants():
    # Means of about 0.01 and deviations of about 0.03 make both constants as large as what they are added to.
    images, others = (0.02 * images_of((1, 3, 7, 7), seed) for seed in (7, 8))
    got = ssim_difference(images, others)[0, 0].numpy()
    # The library adds 1e-12 to a denominator of about 3e-7.
    expected = reference.ssim_difference(images[0].numpy(), others[0].numpy())
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ssim_difference_with_gradients_recorded_equals_that_without(dtype):
    # The library takes another path where no gradient is recorded.
    images, others = images_of((2, 3, 6, 8), 9, dtype), images_of((2, 3, 6, 8), 10, dtype)
    with torch.no_grad():
        without = ssim_difference(images, others)
    recorded = ssim_difference(images, others.clone().requires_grad_())
    torch.testing.assert_close(recorded.detach(), without, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_equal_constant_images_do_not_differ(value):
    image = torch.full((1, 3, 8, 8), value)
    assert gms_difference(image, image).abs().max() < 1e-6
    # On black, the library's epsilon of 1e-12 beside C1 * C2 = 9e-8 makes 1.1e-5 of the difference.
    assert ssim_difference(image, image).abs().max() < 2e-5


def test_equal_random_images_do_not_differ():
    image = images_of((2, 3, 8, 8), 11, torch.float32)
    assert gms_difference(image, image).abs().max() < 1e-6
    assert ssim_difference(image, image).abs().max() < 1e-5


KINDS = {
    "black": lambda: torch.zeros(1, 3, 8, 8),
    "white": lambda: torch.ones(1, 3, 8, 8),
    "grey": lambda: torch.full((1, 3, 8, 8), 0.5),
    "random": lambda: images_of((1, 3, 8, 8), 12, torch.float32),
}


@pytest.mark.parametrize("difference", [gms_difference, ssim_difference])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16 autocast"])
@pytest.mark.parametrize("original", KINDS)
@pytest.mark.parametrize("inpainted", KINDS)
def test_gradients_are_finite_and_results_float32(difference, bf16, original, inpainted):
    image = KINDS[original]()
    leaf = KINDS[inpainted]().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        prediction = leaf.bfloat16() if bf16 else leaf
        got = difference(image, prediction)
        got.mean().backward()
    assert got.dtype == torch.float32
    assert got.isfinite().all()
    assert leaf.grad.isfinite().all()
    if "random" in (original, inpainted) and original != inpainted and difference is ssim_difference:
        assert leaf.grad.abs().max() > 1e-6


@pytest.mark.parametrize("difference", [gms_difference, ssim_difference])
def test_autocast_does_not_lower_the_precision(difference):
    image, other = images_of((1, 3, 8, 8), 13, torch.float32), images_of((1, 3, 8, 8), 14, torch.float32)
    expected = difference(image, other)
    with torch.autocast("cpu", torch.bfloat16):
        got = difference(image, other)
        of_bf16 = difference(image.bfloat16(), other.bfloat16())
    assert torch.equal(got, expected)
    assert torch.equal(of_bf16, difference(image.bfloat16().float(), other.bfloat16().float()))


def test_gms_difference_passes_a_gradient_that_numbers_confirm():
    image, other = images_of((1, 3, 5, 5), 15), images_of((1, 3, 5, 5), 16).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: gms_difference(image, y), (other,), eps=1e-7, atol=1e-5)
