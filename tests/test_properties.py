# SPDX-License-Identifier: Apache-2.0
"""Of any size, window, patch, kind of position and batch: shapes, ranges, determinism, the paper's loops."""

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from anomalib_intra.components.anomaly_map import difference_map
from anomalib_intra.components.reconstruction_post_processor import InTraPostProcessor
from anomalib_intra.intra.torch_model import InpaintingTransformer
from anomalib_intra.one_pass import OnePassTransformer

from .conftest import compared
from .reference import far_from_zero, reference_reconstruct

#: The same examples in every run, since a test that fails now and then is of no use to others.
SAME_EVERY_TIME = settings(derandomize=True, deadline=None, max_examples=40)


@st.composite
def models(draw: st.DrawFn) -> tuple[InpaintingTransformer, tuple[int, int], dict[str, object]]:
    """A small float64 model with weights far from zero, an image size for it, and its options."""
    window_size = draw(st.integers(1, 3), label="window_size")
    patch_size = draw(st.integers(1, 5), label="patch_size")
    rows, columns = (draw(st.integers(window_size, 5), label=side) for side in ("rows", "columns"))
    size = rows * patch_size, columns * patch_size
    options = {
        "attention": draw(st.sampled_from(["mfsa", "msa"])),
        "position": draw(st.sampled_from(["global", "local"])),
        "readout": draw(st.sampled_from(["mean", "token"])),
        "long_residuals": draw(st.booleans(), label="long_residuals"),
    }
    heads = draw(st.sampled_from([1, 2, 4]), label="heads")
    depth = draw(st.integers(1, 3), label="depth")
    trained_size = (window_size * patch_size,) * 2 if options["position"] == "local" else size
    model = InpaintingTransformer(
        trained_size, patch_size, window_size, embed_dim=8, depth=depth, num_heads=heads, **options
    )
    far_from_zero(model, draw(st.integers(0, 2**32 - 1), label="seed of the weights"))
    return model.double().eval(), size, options


def batches(size: tuple[int, int]) -> st.SearchStrategy[torch.Tensor]:
    """One to four images in [0, 1], grey or coloured."""

    def make(count: int, channels: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(count, channels, *size, generator=generator, dtype=torch.float64)

    return st.builds(make, st.integers(1, 4), st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))


@SAME_EVERY_TIME
@given(drawn=models(), data=st.data())
def test_reconstruction_is_that_of_the_loops_whatever_the_model_and_the_batch(drawn, data) -> None:
    model, size, options = drawn
    images = data.draw(batches(size))
    at_once = data.draw(st.integers(1, 60), label="window_batch_size")
    with torch.no_grad():
        reconstruction = model.reconstruct(images, window_batch_size=at_once)
        again = model.reconstruct(images, window_batch_size=at_once)
    assert reconstruction.shape == (len(images), 3, *size)
    assert reconstruction.isfinite().all()
    assert torch.equal(reconstruction, again)
    chosen = data.draw(st.integers(0, len(images) - 1), label="image compared")
    colour = images[chosen].expand(3, *size).numpy()
    expected = reference_reconstruct(model, colour, **options)
    np.testing.assert_allclose(reconstruction[chosen].numpy(), expected, rtol=1e-9, atol=1e-9)


@st.composite
def one_pass_models(draw: st.DrawFn) -> OnePassTransformer:
    """A small one-pass model, in float32, with weights far from zero."""
    block_size = draw(st.integers(1, 4), label="block_size")
    radii = draw(st.lists(st.integers(0, block_size), min_size=1, max_size=3, unique=True), label="radii")
    rows, columns = (draw(st.integers(1, 11), label=side) for side in ("rows", "columns"))
    assume(max(rows, columns) >= 2 * max(radii) + 2)
    patch_size = draw(st.integers(1, 5), label="patch_size")
    model = OnePassTransformer(
        (rows * patch_size, columns * patch_size),
        patch_size,
        embed_dim=8,
        depth=draw(st.integers(1, 3), label="depth"),
        num_heads=draw(st.sampled_from([1, 2, 4]), label="heads"),
        block_size=block_size,
        radii=tuple(radii),
    )
    far_from_zero(model, draw(st.integers(0, 2**32 - 1), label="seed of the weights"))
    return model.eval()


@SAME_EVERY_TIME
@given(model=one_pass_models(), data=st.data())
def test_no_patch_sees_its_hole_and_each_image_sees_the_rest(model: OnePassTransformer, data: st.DataObject) -> None:
    K, (height, width) = model.patch_size, model.image_size
    images = data.draw(batches(model.image_size)).float()
    radius = data.draw(st.sampled_from(model.radii), label="radius")
    row, column = (data.draw(st.integers(0, side // K - 1), label="patch") for side in (height, width))
    y, x = torch.arange(height) // K, torch.arange(width) // K
    hole = ((y - row).abs() <= radius)[:, None] & ((x - column).abs() <= radius)
    patch = (y == row)[:, None] & (x == column)
    with torch.no_grad():
        before = model(images)
        of_radius = before.painted[:, model.radii.index(radius)]
        inside, outside = (model(torch.where(where, 1 - images, images)) for where in (hole, ~hole))
    assert before.painted.shape == (len(images), len(model.radii), 3, height, width)
    assert before.of_cells.shape == (len(images), len(model.radii), height // K, width // K)
    assert before.of_pixels.shape == (len(images), len(model.radii), height, width)
    assert all(x.isfinite().all() for x in before)
    # Not one bit, in any image of the batch; while what lies outside of the hole does change the patch.
    changed = [(x.painted[:, model.radii.index(radius)] != of_radius)[..., patch] for x in (inside, outside)]
    assert not changed[0].any()
    assert changed[1].flatten(1).any(dim=1).all()


@SAME_EVERY_TIME
@given(model=one_pass_models(), data=st.data())
def test_gradients_are_finite_whatever_the_model_and_the_images(model: OnePassTransformer, data: st.DataObject) -> None:
    images = data.draw(batches(model.image_size)).float() * data.draw(st.sampled_from([0.0, 1e-3, 1.0]))
    _, *outputs = model(images)
    sum(x.square().mean() for x in outputs).backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    assert model.to_pixels.weight.grad.any()


@SAME_EVERY_TIME
@given(
    height=st.integers(8, 200),
    width=st.integers(8, 200),
    count=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    contrast=st.sampled_from([0.0, 1e-3, 1.0]),
)
def test_maps_and_scores_are_finite_in_range_and_independent_of_the_batch(
    height: int, width: int, count: int, seed: int, contrast: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images, reconstructions = torch.rand(2, count, 3, height, width, generator=generator) * contrast
    post_processor = InTraPostProcessor(enable_normalization=False)
    difference = difference_map(images, reconstructions)
    assert difference.shape == (count, 1, height, width)
    assert 0 <= difference.min() <= difference.max() <= 1
    torch.testing.assert_close(difference_map(images, images), torch.zeros_like(difference))
    post_processor.set_training_mean(difference.mean(dim=0, keepdim=True))
    raw = post_processor(compared(images, reconstructions))
    assert raw.anomaly_map.shape == (count, 1, height, width)
    assert 0 <= raw.anomaly_map.min() <= raw.anomaly_map.max() <= 1
    assert torch.equal(raw.pred_score, raw.anomaly_map.amax(dim=(1, 2, 3)))
    for number in range(count):
        alone = post_processor(compared(images[number : number + 1], reconstructions[number : number + 1]))
        torch.testing.assert_close(alone.pred_score[0], raw.pred_score[number], rtol=0, atol=1e-6)
