# SPDX-License-Identifier: Apache-2.0
"""The inpainting transformer (eq. 3-5, sec. 3.3 and 3.5) against a plain float64 reference."""

import copy
import math

import numpy as np
import pytest
import torch

from anomalib_intra.intra.torch_model import InpaintingTransformer

from ..reference import far_from_zero, reference_inpaint, reference_patches, reference_reconstruct

K, D, HEADS = 4, 8, 2


def build(image_size=(16, 20), window_size=3, depth=3, seed=0, **options):
    """A small model in float64, all of whose parameters are far from zero."""
    model = InpaintingTransformer(
        image_size, patch_size=K, window_size=window_size, embed_dim=D, depth=depth, num_heads=HEADS, **options
    ).double()
    far_from_zero(model, seed)
    return model.eval()


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


VARIANTS = [
    # attention, position, readout, long residuals, depth
    ("mfsa", "global", "mean", True, 1),
    ("mfsa", "global", "mean", True, 4),
    ("mfsa", "global", "token", True, 5),
    ("mfsa", "local", "mean", True, 3),
    ("mfsa", "local", "token", False, 2),
    ("msa", "global", "token", True, 3),
    ("msa", "global", "mean", False, 3),
    ("msa", "local", "mean", True, 2),
]


@pytest.mark.parametrize(("attention", "position", "readout", "long_residuals", "depth"), VARIANTS)
def test_inpaint_equals_the_reference_in_corners_at_borders_and_inside(
    attention, position, readout, long_residuals, depth
):
    rows, columns, L = 4, 5, 3
    model = build(
        depth=depth, attention=attention, position=position, readout=readout, long_residuals=long_residuals, seed=depth
    )
    patches = reference_patches(rand(3, rows * K, columns * K, seed=1).numpy(), K)
    # (r, s, t, u): the grid's corners, its borders, its middle; hidden patches at all kinds of places in the window.
    places = [(1, 1, 1, 1), (1, 3, 1, 5), (2, 1, 4, 1), (2, 3, 4, 5), (1, 2, 1, 3), (2, 2, 3, 2), (2, 3, 2, 4)]
    windows = torch.stack(
        [torch.from_numpy(patches[r - 1 : r - 1 + L, s - 1 : s - 1 + L].copy()) for r, s, _, _ in places]
    )
    got = model.inpaint(windows, *torch.tensor(places).unbind(1)).detach().numpy()
    for number, (r, s, t, u) in enumerate(places):
        expected = reference_inpaint(model, patches, r, s, t, u, attention, position, readout, long_residuals)
        np.testing.assert_allclose(got[number], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("size", "window_size", "options"),
    [
        ((16, 16), 3, {}),
        ((16, 20), 3, {}),
        ((20, 12), 3, {"position": "local", "readout": "token"}),
        ((16, 20), 2, {"attention": "msa"}),
        ((12, 12), 3, {"readout": "token"}),
        ((16, 20), 3, {"readout": "token", "depth": 1}),
        ((16, 20), 3, {"readout": "mean", "depth": 1}),
        ((16, 20), 3, {"feature_dim": 12}),
    ],
    ids=[
        "square",
        "wide",
        "tall",
        "even window",
        "window as large as the image",
        "one block, token",
        "one block, mean",
        "queries wider than values",
    ],
)
def test_reconstruct_equals_the_reference_patch_by_patch(size, window_size, options):
    model = build(size, window_size, **options)
    images = rand(2, 3, *size, seed=2)
    got = model.reconstruct(images).detach().numpy()
    got_single = copy.deepcopy(model).float().reconstruct(images.float()).detach().numpy()
    choices = {"attention": "mfsa", "position": "global", "readout": "mean", "long_residuals": True}
    choices |= {key: value for key, value in options.items() if key in choices}
    for b, image in enumerate(images):
        expected = reference_reconstruct(model, image.numpy(), **choices)
        np.testing.assert_allclose(got[b], expected, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(got_single[b], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", ["global", "local"])
def test_window_shift_reconstructs_the_mean_over_the_windows_around(position):
    rows, columns, L = 4, 5, 3
    model = build(window_size=L, position=position, window_shift=1)
    image = rand(1, 3, rows * K, columns * K, seed=2)
    patches = reference_patches(image[0].numpy(), K)
    expected = np.zeros((rows, columns, 3 * K**2))
    for t, u in np.ndindex(rows, columns):
        for i, j in np.ndindex(3, 3):
            # The central window, moved by -1, 0 or 1 as far as the border and, for patches at the border, they allow.
            r, s = (
                min(max(min(max(c - 1, 1), length - L + 1) + by - 1, 1, c - L + 1), length - L + 1, c)
                for c, length, by in ((t + 1, rows, i), (u + 1, columns, j))
            )
            expected[t, u] += reference_inpaint(model, patches, r, s, t + 1, u + 1, "mfsa", position, "mean", True) / 9
    got = reference_patches(model.reconstruct(image)[0].detach().numpy(), K)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shift", [-1, 2])
def test_window_shifts_that_lose_the_patch_are_refused(shift):
    with pytest.raises(ValueError, match=r"window_shift must be in 0 \.\. 1 for windows of 3"):
        build(window_size=3, window_shift=shift)


# ---- the hidden patch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readout", ["mean", "token"])
def test_inpainted_patch_does_not_depend_on_the_hidden_patch_but_on_all_others(readout):
    model = build(depth=4, readout=readout)
    windows = rand(1, 3, 3, K * K * 3, seed=4).requires_grad_()
    # The hidden patch (2, 4) is row 0, column 2 of the window at (2, 2).
    model.inpaint(windows, *torch.tensor([[2, 2, 2, 4]]).unbind(1)).sum().backward()
    influence = windows.grad[0].abs().sum(dim=-1)
    for i in range(3):
        for j in range(3):
            assert (influence[i, j] > 0) == ((i, j) != (0, 2))


@pytest.mark.parametrize(("t", "u"), [(1, 1), (1, 5), (4, 1), (4, 5), (1, 3), (3, 1), (2, 3)])
def test_reconstruction_of_a_patch_is_independent_of_its_own_pixels(t, u):
    model = build()
    images = rand(1, 3, 16, 20, seed=5)
    changed = images.clone()
    patch = (slice(None), slice(None), slice((t - 1) * K, t * K), slice((u - 1) * K, u * K))
    changed[patch] = 1 - changed[patch]
    before, after = model.reconstruct(images), model.reconstruct(changed)
    assert torch.equal(before[patch], after[patch])
    # Its neighbours did see the change.
    neighbour = (slice(None), slice(None), patch[2], slice((u - 2) * K, (u - 1) * K) if u > 1 else slice(K, 2 * K))
    assert (before[neighbour] - after[neighbour]).abs().max() > 1e-6


# ---- what goes in ----------------------------------------------------------------------------------------------------


def test_one_channel_is_taken_as_three_equal_ones():
    model = build()
    grey = rand(2, 1, 16, 20, seed=6)
    expected = model.reconstruct(torch.cat([grey, grey, grey], dim=1))
    assert torch.equal(model.reconstruct(grey), expected)
    image, reconstruction = model(grey)
    assert torch.equal(image, torch.cat([grey, grey, grey], dim=1))
    assert torch.equal(reconstruction, expected)


@pytest.mark.parametrize("window_batch_size", [1, 3, 7, 40, 1000])
def test_window_batch_size_does_not_change_the_reconstruction(window_batch_size):
    model = build().float()
    images = rand(2, 3, 16, 20, seed=7, dtype=torch.float32)
    expected = model.reconstruct(images, window_batch_size=20)
    got = model.reconstruct(images, window_batch_size=window_batch_size)
    # Values of about 10 come from sums whose order depends on the batch size: one float32 rounding.
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("window_batch_size", "at_once"), [(1, 2), (7, 6), (8, 8), (1000, 40)])
def test_window_batch_size_bounds_the_windows_inpainted_at_once(window_batch_size, at_once):
    # 40 windows of two images; each image has as many of them in a call as the other, at least one.
    model = build()
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    model.reconstruct(rand(2, 3, 16, 20, seed=7), window_batch_size=window_batch_size)
    assert sum(seen) == 40
    assert max(seen) == at_once


def test_images_of_a_batch_do_not_influence_each_other():
    model = build()
    images = rand(3, 3, 16, 20, seed=8)
    together = model.reconstruct(images)
    for b in range(3):
        torch.testing.assert_close(model.reconstruct(images[b : b + 1])[0], together[b], rtol=0, atol=1e-12)


def test_local_positions_accept_images_of_other_sizes():
    model = build((16, 20), position="local")
    assert model.position_embedding.shape == (9, D)
    assert model.reconstruct(rand(1, 3, 12, 28)).shape == (1, 3, 12, 28)


def test_global_positions_refuse_images_of_other_sizes():
    model = build((16, 20), position="global")
    assert model.position_embedding.shape == (20, D)
    with pytest.raises(ValueError, match="12 x 28") as error:
        model.reconstruct(rand(1, 3, 12, 28))
    assert "16 x 20" in str(error.value)
    # The same number of patches is not the same grid.
    with pytest.raises(ValueError, match="20 x 16"):
        model.reconstruct(rand(1, 3, 20, 16))


@pytest.mark.parametrize("position", ["local", "global"])
@pytest.mark.parametrize("size", [(16, 18), (15, 20), (8, 20), (16, 8)])
def test_images_that_are_no_grid_or_hold_no_window_are_refused(position, size):
    model = build((16, 20), position=position)
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}.*multiples of 4 and at least 12"):
        model.reconstruct(rand(1, 3, *size))


@pytest.mark.parametrize("shape", [(3, 16, 20), (1, 1, 3, 16, 20), (1, 2, 16, 20), (1, 4, 16, 20), (16, 20)])
def test_images_of_another_shape_are_refused(shape):
    model = build()
    for call in (model, model.reconstruct):
        with pytest.raises(ValueError, match=r"\(B, 3, H, W\) or \(B, 1, H, W\)") as error:
            call(rand(*shape))
        assert str(shape) in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(value):
    images = rand(1, 3, 16, 20)
    images[0, 1, 15, 19] = value
    with pytest.raises(ValueError, match=r"NaN or infinite.*\[0, 1\]"):
        build().reconstruct(images)


@pytest.mark.parametrize("value", [-0.1, 1.1, 255.0, -2.1])
def test_values_outside_of_0_to_1_are_refused(value):
    images = rand(1, 3, 16, 20)
    images[0, 2, 0, 0] = value
    with pytest.raises(ValueError, match=r"\[0, 1\].*Normalize") as error:
        build().reconstruct(images)
    assert f"{value:.3g}" in str(error.value)


def test_black_and_white_are_accepted():
    model = build()
    assert model.reconstruct(torch.zeros(1, 3, 16, 20).double()).isfinite().all()
    assert model.reconstruct(torch.ones(1, 3, 16, 20).double()).isfinite().all()


@pytest.mark.parametrize("option", ["attention", "position", "readout"])
def test_unknown_option_values_are_refused_and_the_known_ones_named(option):
    known = {"attention": ("mfsa", "msa"), "position": ("global", "local"), "readout": ("mean", "token")}[option]
    with pytest.raises(ValueError, match=f"{option}.*'nonsense'") as error:
        InpaintingTransformer((16, 20), K, 3, D, 1, HEADS, **{option: "nonsense"})
    assert all(repr(value) in str(error.value) for value in known)


@pytest.mark.parametrize("size", [(16, 18), (16, 8)])
def test_image_sizes_that_do_not_fit_are_refused_when_the_model_is_built(size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}"):
        InpaintingTransformer(size, K, 3, D, 1, HEADS)


# ---- size and initial weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attention", "millions", "decimals"), [("mfsa", 55.55, 2), ("msa", 41.9, 1)])
def test_defaults_have_the_parameters_of_the_paper(attention, millions, decimals):
    with torch.device("meta"):
        model = InpaintingTransformer(attention=attention)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, decimals) == millions


def test_weights_are_drawn_with_std_0_02_and_each_block_on_its_own():
    torch.manual_seed(0)
    model = InpaintingTransformer((64, 64), patch_size=8, window_size=3, embed_dim=64, depth=3, num_heads=4)
    blocks = [dict(block.named_parameters()) for block in model.blocks]
    drawn = 0
    for name, weight in blocks[0].items():
        if weight.ndim == 2:
            drawn += 1
            assert not any(torch.equal(weight, block[name]) for block in blocks[1:])
            assert not torch.equal(blocks[1][name], blocks[2][name])
    assert drawn == 8  # two each of query and key, value, unify, two of the MLP
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            # At least 2048 draws: the standard error of the standard deviation is below 1.6 %.
            assert parameter.numel() >= 2048
            assert parameter.std().item() == pytest.approx(0.02, rel=0.08), name
            assert abs(parameter.mean().item()) < 0.02 * 0.1, name
        elif name.endswith("bias"):
            assert not parameter.any(), name
    assert 0.01 < model.inpaint_embedding.std() < 0.03


@pytest.mark.parametrize(("depth", "differ"), [(2, True), (4, True), (3, False), (13, False)])
def test_models_of_before_double_the_middle_of_an_even_number_of_blocks(depth: int, differ: bool) -> None:
    model = build(depth=depth)
    images = rand(1, 3, 4 * K, 5 * K)
    now = model.reconstruct(images)
    model.doubles_middle = True
    assert torch.equal(now, model.reconstruct(images)) != differ
    del model.doubles_middle  # what was pickled by an older version
    assert torch.equal(model.reconstruct(images), now) != differ
