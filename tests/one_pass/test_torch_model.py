# SPDX-License-Identifier: Apache-2.0
"""The one-pass transformer against a plain float64 reference, and its blindness bit for bit."""

import contextlib
import copy
import math

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_intra.one_pass import OnePassTransformer, attention, fast_attention

from ..reference import far_from_zero
from .reference import reference_one_pass

K, D, HEADS = 2, 8, 2


def build(grid=(7, 10), radii=(0, 1, 2), block_size=2, depth=2, seed=0, **options):
    """A small model in float64, all of whose parameters are far from zero."""
    model = OnePassTransformer(
        (grid[0] * K, grid[1] * K), K, D, depth, HEADS, block_size=block_size, radii=radii, **options
    ).double()
    far_from_zero(model, seed)
    model.set_channel_statistics(torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3]))
    return model.eval()


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((7, 10), {}),
        ((8, 8), {"depth": 1}),
        ((10, 5), {"block_size": 3, "radii": (3, -1)}),
        ((2, 9), {"radii": (0, 2)}),
        ((2, 2), {"radii": (-1, 0)}),
    ],
    ids=["blocks over the edge", "blocks that fit", "open, and a hole as large as a block", "flat", "one block"],
)
def test_reconstructions_equal_the_reference_patch_by_patch(grid, options):
    model = build(grid, **options)
    images = rand(2, 3, grid[0] * K, grid[1] * K, seed=1)
    got = model(images).painted.detach().numpy()
    single = copy.deepcopy(model).float()(images.float()).painted.detach().numpy()
    for b, image in enumerate(images.numpy()):
        for number, radius in enumerate(model.radii):
            expected = reference_one_pass(model, image, radius)
            np.testing.assert_allclose(got[b, number], expected, rtol=1e-9, atol=1e-10)
            np.testing.assert_allclose(single[b, number], expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    block_size=st.integers(1, 4),
    radius=st.integers(-1, 3),
    seed=st.integers(0, 99),
)
def test_every_size_that_is_built_equals_the_reference(rows, columns, block_size, radius, seed):
    if radius > block_size or max(rows, columns) < 2 * radius + 2:
        with pytest.raises(ValueError, match=r"radii|nearest size"):
            build((rows, columns), (radius,), block_size)
        return
    model = build((rows, columns), (radius,), block_size, depth=1, seed=seed)
    images = rand(1, 3, rows * K, columns * K, seed=seed)
    expected = reference_one_pass(model, images[0].numpy(), radius)
    np.testing.assert_allclose(model.reconstruct(images, radius)[0].detach().numpy(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bf16"])
def test_radii_together_equal_each_alone(amp):
    model = build(radii=(-1, 0, 1, 2)).float()
    images = rand(2, 3, 14, 20, dtype=torch.float32)
    with torch.no_grad(), autocast(amp):
        together = model(images).painted
        for number, radius in enumerate(model.radii):
            # Products over rows of another number may round otherwise; values are of about 1.
            tolerance = 0.05 if amp else 1e-5
            torch.testing.assert_close(
                together[:, number], model.reconstruct(images, radius), rtol=tolerance, atol=tolerance
            )


# ---- blindness -------------------------------------------------------------------------------------------------------


def autocast(enabled):
    return torch.autocast("cpu", torch.bfloat16) if enabled else contextlib.nullcontext()


def hole(t, u, radius, grid, patch_size=K):
    """Of the pixels of an image: those of the patches within the radius of (t, u)."""
    i, j = (torch.arange(length * patch_size) // patch_size for length in grid)
    return ((i - t).abs() <= radius)[:, None] & ((j - u).abs() <= radius)[None]


PLACES = [(0, 0), (0, 9), (6, 0), (6, 9), (0, 4), (3, 0), (6, 5), (3, 9), (3, 4), (2, 5), (4, 7)]


@pytest.fixture(params=["fast", "fast, in strips", "plain"])
def path(request, monkeypatch):
    """All ways to compute attention: that of a CPU, where images are large or small, and that of everything else."""
    if request.param == "plain":
        monkeypatch.setattr(attention, "_on_cpu", lambda _: False)
    if request.param == "fast, in strips":
        monkeypatch.setattr(fast_attention, "_SCORES", 1)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("radius", [0, 1, 2])
@pytest.mark.parametrize("together", [False, True], ids=["one radius", "all radii"])
def test_what_lies_in_the_hole_does_not_change_one_bit(radius, amp, together):
    grid = (7, 10)
    model = build(grid, depth=3).float()
    images = rand(1, 3, 14, 20, seed=5, dtype=torch.float32)

    def reconstruct(images):
        with autocast(amp), torch.no_grad():
            if together:
                return model(images).painted[:, model.radii.index(radius)]
            return model.reconstruct(images, radius)

    before = reconstruct(images)
    for t, u in PLACES:
        own = (..., slice(t * K, (t + 1) * K), slice(u * K, (u + 1) * K))
        inside = hole(t, u, radius, grid)
        for new in (1 - images, torch.ones_like(images), rand(1, 3, 14, 20, seed=6, dtype=torch.float32)):
            after = reconstruct(torch.where(inside, new, images))
            assert torch.equal(before[own], after[own])
        # The next patch did see the change.
        assert not torch.equal(before, after)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("radius", [-1, 0, 1, 2])
def test_every_patch_outside_of_the_hole_and_none_inside_has_an_influence(radius):
    grid = (7, 10)
    model = build(grid, radii=(-1, 0, 1, 2))
    for t, u in PLACES:
        images = rand(1, 3, 14, 20, seed=5).requires_grad_()
        painted = model.reconstruct(images, radius)[0, :, t * K : (t + 1) * K, u * K : (u + 1) * K]
        painted.square().sum().backward()
        influence = images.grad[0].abs().sum(dim=0)
        assert torch.equal(influence > 1e-12, ~hole(t, u, radius, grid))


def test_what_a_black_image_and_its_opposite_paint_stays_finite():
    model = build().float()
    for amp in (False, True):
        for images in (torch.zeros(1, 3, 14, 20), torch.ones(1, 3, 14, 20)):
            with autocast(amp):
                assert model(images).painted.isfinite().all()


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("radius", [-1, 0, 2])
def test_gradients_are_finite_and_reach_every_parameter(radius, amp):
    # In the smallest grids a hole hides almost everything; blocks reach over the edge of the image.
    for grid in ((5, 6), (7, 10), (3, 6)):
        model = build(grid, radii=(-1, 0, 2)).float()
        images = rand(2, 3, grid[0] * K, grid[1] * K, dtype=torch.float32)
        with autocast(amp):
            _, *outputs = model.paint(images, (radius,))
        sum(x.float().square().mean() for x in outputs).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


# ---- the fast path ---------------------------------------------------------------------------------------------------


def attended_and_gradients(attend, dtype=torch.float64):
    batch, heads, i, j, s, d, radii = 2, 3, 4, 3, 2, 5, 2
    blocks, queries = i * j, radii * s * s
    shapes = [
        (batch, heads, blocks, queries, d),
        (batch, heads, 2, i, j, s * s, d),
        (batch, heads, 2, blocks, d),
        (heads, queries, 9 * s * s),
        (heads, blocks, blocks),
    ]
    inputs = [rand(*shape, seed=seed) - 0.5 for seed, shape in enumerate(shapes)]
    inputs = [
        x.to(dtype if number < 3 else torch.promote_types(dtype, torch.float32)) for number, x in enumerate(inputs)
    ]
    inputs = [x.requires_grad_() for x in inputs]
    mask = torch.zeros(blocks, queries, 9 * s * s + blocks, dtype=inputs[-1].dtype)
    mask[rand(*mask.shape, seed=9) < 0.4] = -torch.inf
    attended = attend(*inputs, mask)
    weights = rand(*attended.shape, seed=10).to(dtype)
    return attended.detach(), *torch.autograd.grad((attended * weights).sum(), inputs)


@pytest.mark.parametrize("scores", [1, 2000, 2**19])
def test_fast_attention_and_its_gradients_equal_the_plain_ones(scores, monkeypatch):
    monkeypatch.setattr(fast_attention, "_SCORES", scores)
    fast, plain = attended_and_gradients(attention.attend_fast), attended_and_gradients(attention.attend)
    for got, expected in zip(fast, plain, strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_fast_attention_in_bf16_is_as_near_to_float64_as_the_plain_one():
    exact = attended_and_gradients(attention.attend)
    results = {
        attend: attended_and_gradients(attend, torch.bfloat16) for attend in (attention.attend, attention.attend_fast)
    }
    errors = {
        attend: [
            ((got.double() - expected).norm() / expected.norm()).item()
            for got, expected in zip(result, exact, strict=True)
        ]
        for attend, result in results.items()
    }
    for plain, fast in zip(*errors.values(), strict=True):
        assert fast < max(1.5 * plain, 0.01)


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bf16"])
def test_whole_model_gives_the_same_on_the_plain_path(amp, monkeypatch):
    model, images = build().float(), rand(2, 3, 14, 20, dtype=torch.float32)

    def run():
        with autocast(amp):
            _, *outputs = model(images)
        loss = sum(x.float().square().mean() for x in outputs)
        return *outputs, *torch.autograd.grad(loss, list(model.parameters()))

    fast = run()
    monkeypatch.setattr(attention, "_on_cpu", lambda _: False)
    for got, expected in zip(fast, run(), strict=True):
        difference = (got.float() - expected.float()).norm() / expected.float().norm()
        assert difference < (0.03 if amp else 1e-5)


# ---- what goes in ----------------------------------------------------------------------------------------------------


def test_one_channel_is_taken_as_three_equal_ones():
    model = build()
    grey = rand(2, 1, 14, 20, seed=6)
    colour = torch.cat([grey, grey, grey], dim=1)
    assert torch.equal(model.reconstruct(grey, 1), model.reconstruct(colour, 1))
    for got, expected in zip(model(grey), model(colour), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(model(grey).image, colour)


def test_images_of_a_batch_do_not_influence_each_other():
    model = build()
    images = rand(3, 3, 14, 20, seed=8)
    together = model(images).painted
    for b in range(3):
        torch.testing.assert_close(model(images[b : b + 1]).painted[0], together[b], rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 14, 20), (1, 1, 3, 14, 20), (1, 2, 14, 20), (14, 20)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\) or \(B, 1, H, W\)") as error:
        build()(rand(*shape))
    assert str(shape) in str(error.value)


def test_images_of_another_size_are_refused_and_the_size_is_named():
    with pytest.raises(ValueError, match=r"20 x 14 pixels reached.*14 x 20: resize"):
        build()(rand(1, 3, 20, 14))


@pytest.mark.parametrize(("value", "message"), [(math.nan, "NaN"), (1.1, "Normalize"), (-2.1, "Normalize")])
def test_values_outside_of_the_range_are_refused(value, message):
    images = rand(1, 3, 14, 20)
    images[0, 1, 13, 19] = value
    with pytest.raises(ValueError, match=message):
        build().reconstruct(images, 0)


def test_the_comparison_sees_the_patch_and_does_not_teach_the_transformer():
    model = build()
    images = rand(1, 3, 14, 20, seed=3)
    before = model(images)
    images[..., :K, :K] = 1 - images[..., :K, :K]  # in its own hole, whatever the radius
    after = model(images)
    assert ((after.of_cells - before.of_cells)[..., 0, 0].abs() > 1e-9).all()
    assert ((after.of_pixels - before.of_pixels)[..., :K, :K].abs() > 1e-9).all()
    (after.of_cells.sum() + after.of_pixels.sum()).backward()
    taught = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert taught == {"comparison"}


def test_unknown_radii_are_refused_and_the_known_ones_named():
    with pytest.raises(ValueError, match=r"radii \(0, 1, 2\), got \(-1,\)"):
        build().reconstruct(rand(1, 3, 14, 20), -1)


@pytest.mark.parametrize("radii", [(), (0, 0), (-2,), (0, 5)])
def test_radii_that_do_not_work_are_refused(radii):
    with pytest.raises(ValueError, match=r"-1 \.\. 4, the block_size"):
        OnePassTransformer((64, 64), radii=radii)


@pytest.mark.parametrize(
    ("size", "works"),
    [
        ((250, 256), (248, 256)),
        ((256, 261), (256, 264)),
        ((32, 40), (32, 48)),
        ((3, 512), (8, 512)),
    ],
)
def test_sizes_that_do_not_work_are_refused_and_the_nearest_that_works_is_named(size, works):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}.*nearest size that works is {works[0]} x {works[1]}"):
        OnePassTransformer(size, embed_dim=8)
    OnePassTransformer(works, embed_dim=8)


def test_heads_that_do_not_divide_the_dimension_are_refused():
    with pytest.raises(ValueError, match="num_heads=3 must divide embed_dim=8"):
        OnePassTransformer((64, 64), embed_dim=8, num_heads=3)


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("size", [(512, 512), (200, 328)], ids=["blocks that fit", "blocks over the edge"])
def test_large_images_are_painted_blindly_and_teach(size, amp):
    model = OnePassTransformer(size, embed_dim=16, depth=1)
    far_from_zero(model, 0)
    images = rand(1, 3, *size, seed=1, dtype=torch.float32)

    def paint(images):
        with autocast(amp), torch.no_grad():
            return model(images).painted

    before = paint(images)
    assert before.isfinite().all()
    rows, columns = grid = size[0] // 8, size[1] // 8
    for t, u in ((0, 0), (rows // 2, columns // 2)):
        for number, radius in enumerate(model.radii):
            own = (0, number, slice(None), slice(8 * t, 8 * t + 8), slice(8 * u, 8 * u + 8))
            after = paint(torch.where(hole(t, u, radius, grid, patch_size=8), 1 - images, images))
            assert torch.equal(before[own], after[own])
            assert not torch.equal(before, after)
    with autocast(amp):
        _, *outputs = model(images)
    sum(x.float().square().mean() for x in outputs).backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("size", [256, 320, 512])
def test_common_sizes_are_built(size):
    with torch.device("meta"):
        OnePassTransformer((size, size))


# ---- initial weights -------------------------------------------------------------------------------------------------


def test_weights_are_drawn_with_std_0_02_and_the_same_ones_from_the_same_seed():
    torch.manual_seed(0)
    model = OnePassTransformer((64, 64), embed_dim=64, depth=2, num_heads=8)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and parameter.ndim == 1:
            assert not parameter.any() or "norm" in name, name
        elif name == "position_embedding" or (parameter.ndim == 2 and name.endswith("weight")):
            # At least 4096 draws: the standard error of the standard deviation is about 1 %.
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
    assert not model.radius_embedding.any()
    drawn = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    torch.manual_seed(3)
    model.reset_parameters()
    again = OnePassTransformer((64, 64), embed_dim=64, depth=2, num_heads=8)
    torch.manual_seed(3)
    again.reset_parameters()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert not torch.equal(model.to_pixels.weight, drawn["to_pixels.weight"])


def test_most_heads_begin_with_a_side_of_the_ring_each():
    model = OnePassTransformer((64, 64), embed_dim=64, depth=2, num_heads=8, radii=(0,))
    bias = model.near_bias.detach().unflatten(0, (15, 15)).unflatten(-1, (2, 8))
    assert torch.equal(bias[:, :, 0], bias[:, :, 1])
    peaks = [divmod(bias[:, :, 0, head].argmax().item(), 15) for head in range(6)]
    assert peaks == [(6, 7), (8, 7), (7, 6), (7, 8), (6, 6), (6, 8)]
    assert not bias[..., 6:].any()


# ---- export ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model, and the ONNX file of what it paints."""
    model = build().float()

    class Painted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model(images).painted

    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    torch.onnx.export(
        Painted().eval(),
        (rand(2, 3, 14, 20, dtype=torch.float32),),
        path,
        dynamo=True,
        opset_version=18,
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    return model, path


def runner(path, runtime):
    """What runs an ONNX file: ONNX Runtime, or OpenVINO in a precision."""
    if runtime == "onnxruntime":
        session = onnxruntime.InferenceSession(path)
        return lambda images: session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    core = pytest.importorskip("openvino").Core()
    if runtime == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("This processor does not compute in bf16.")
    compiled = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": runtime})
    return lambda images: compiled(images.numpy())[0].astype(np.float32)


@pytest.mark.parametrize("runtime", ["onnxruntime", "f32", "bf16"])
def test_exported_to_onnx_it_paints_the_same_and_stays_blind(runtime, exported):
    model, path = exported
    run = runner(path, runtime)
    tolerance = 0.1 if runtime == "bf16" else 1e-4
    for batch in (1, 3):
        images = rand(batch, 3, 14, 20, seed=batch, dtype=torch.float32)
        expected = model(images).painted.detach().numpy()
        np.testing.assert_allclose(run(images), expected, rtol=tolerance, atol=tolerance)
    images = rand(1, 3, 14, 20, dtype=torch.float32)
    before = run(images)
    for number, radius in enumerate(model.radii):
        for t, u in PLACES:
            inside = hole(t, u, radius, (7, 10))
            own = (0, number, slice(None), slice(t * K, (t + 1) * K), slice(u * K, (u + 1) * K))
            after = run(torch.where(inside, 1 - images, images))
            np.testing.assert_array_equal(before[own], after[own])
            if (t, u) == (3, 4):
                for other in [(v, w) for v in range(7) for w in range(10) if not inside[v * K, w * K]]:
                    after = run(torch.where(hole(*other, 0, (7, 10)), 1 - images, images))
                    assert (before[own] != after[own]).any(), (radius, other)
