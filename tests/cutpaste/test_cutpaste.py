# SPDX-License-Identifier: Apache-2.0
"""The three forms, the Gaussian, scores and maps."""

import math

import numpy as np
import pytest
import torch
from kornia.color import rgb_to_hsv
from sklearn.covariance import OAS

from anomalib_intra.cutpaste import augmentation
from anomalib_intra.cutpaste.augmentation import Boxes, ThreeForms, paste, patches, scars
from anomalib_intra.cutpaste.gaussian import Gaussian, Moments
from anomalib_intra.cutpaste.torch_model import CutPasteModel, grad_cam, spread_to_pixels

COUNT = 400
SIZES = [(256, 256), (64, 64), (96, 160)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def fitted(image_size: tuple[int, int] = (64, 64), patch_size: int | None = None) -> CutPasteModel:
    """A model as it is before training, with the Gaussian of a few images of noise."""
    model = CutPasteModel(image_size, patch_size).eval()
    with torch.no_grad():
        model.gaussian.fit(Moments.of(model.features(torch.rand(4, 3, *image_size))))
    return model


# ---- boxes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_patches_have_the_papers_areas_and_aspects(size: tuple[int, int]) -> None:
    height, width = patches(COUNT, size).size.T
    half_a_pixel = (height + width) / 2 + 0.25  # of rounding each side, in area
    area = height * width
    assert (area >= 0.02 * math.prod(size) - half_a_pixel).all()
    assert (area <= 0.15 * math.prod(size) + half_a_pixel).all()
    assert ((width + 0.5) / (height - 0.5) >= 0.3).all()
    assert ((width - 0.5) / (height + 0.5) <= 3.3).all()
    # Both ranges are used, and well.
    assert 0.4 < (width < height).float().mean() < 0.6
    assert area.min() < 0.03 * math.prod(size) < 0.13 * math.prod(size) < area.max()


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_scars_have_the_papers_sizes_and_angles(scale: float) -> None:
    boxes = scars(COUNT, (512, 512), scale)
    length, width = boxes.size.T
    assert length.min() == 10 * scale
    assert length.max() == int(25 * scale)
    assert width.min() == 2 * scale
    assert width.max() == 16 * scale
    degrees = boxes.angle.rad2deg()
    assert -45 <= degrees.min() < -43
    assert 43 < degrees.max() <= 45


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("draw", [patches, lambda *args: scars(*args, scale=0.25)], ids=["patches", "scars"])
def test_boxes_lie_inside_the_image_before_and_after(draw, size: tuple[int, int]) -> None:
    boxes = draw(COUNT, size)
    corners = torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]]) * boxes.size[:, None] / 2
    cos, sin = boxes.angle.cos()[:, None], boxes.angle.sin()[:, None]
    turned = torch.stack(
        [cos * corners[..., 0] + sin * corners[..., 1], cos * corners[..., 1] - sin * corners[..., 0]], dim=-1
    )
    for middle, offset in ((boxes.source, corners), (boxes.target, turned)):
        positions = middle[:, None] + offset
        assert (positions >= -1e-4).all()
        assert (positions <= torch.tensor(size) + 1e-4).all()


# ---- pasting ---------------------------------------------------------------------------------------------------------


def test_an_upright_box_is_copied_pixel_by_pixel_and_the_rest_stays() -> None:
    images, others = torch.rand(2, COUNT, 3, 32, 48)
    boxes = patches(COUNT, (32, 48))
    got = paste(images, others, boxes)
    for n, (size, _, source, target) in enumerate(zip(*boxes, strict=True)):
        (y, x), (to_y, to_x) = ((middle - size / 2).int().tolist() for middle in (source, target))
        height, width = size.int().tolist()
        expected = images[n].clone()
        expected[:, to_y : to_y + height, to_x : to_x + width] = others[n, :, y : y + height, x : x + width]
        assert torch.equal(got[n], expected)


def test_a_turned_box_has_its_area_its_pixels_and_its_direction() -> None:
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    others = torch.stack([rows, columns, torch.ones(64, 64)])[None]
    angle = math.radians(30)
    box = Boxes(*(torch.tensor([x]) for x in ((24.0, 8.0), angle, (20.0, 40.0), (32.0, 32.0))))
    got = paste(torch.zeros(1, 3, 64, 64), others, box)[0]
    pasted = got[2] == 1
    assert int(pasted.sum()) == pytest.approx(24 * 8, rel=0.05)
    assert (got[:, ~pasted] == 0).all()
    # A pixel comes from where turning it back around the middles leads.
    for y, x in pasted.nonzero().tolist():
        dy, dx = y + 0.5 - 32, x + 0.5 - 32
        source = 20 + math.cos(angle) * dy - math.sin(angle) * dx, 40 + math.sin(angle) * dy + math.cos(angle) * dx
        assert got[:2, y, x].tolist() == [math.floor(source[0]), math.floor(source[1])]
        assert abs(source[0] - 20) < 12
        assert abs(source[1] - 40) < 4


# ---- three forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("patch_size", "side"), [(None, 64), (32, 32)])
def test_three_forms_in_equal_number_and_what_is_not_pasted_stays(patch_size: int | None, side: int) -> None:
    images, labels = ThreeForms((64, 64), patch_size)(torch.rand(5, 3, 64, 64))
    assert images.shape == (15, 3, side, side)
    assert 0 <= images.min() < images.max() <= 1
    assert labels.bincount().tolist() == [5, 5, 5]
    normal, *spoiled = images.chunk(3)
    assert (labels.chunk(3)[0] == 0).all()
    for form in spoiled:
        changed = (form != normal).any(dim=1).float().mean(dim=(1, 2))
        assert (changed > 0).all()
        assert (changed < 0.5).all()
    assert not torch.equal(*spoiled)


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_images_are_shifted_by_whole_pixels_up_to_a_sixteenth(monkeypatch, size: tuple[int, int]) -> None:
    monkeypatch.setattr(augmentation, "JITTER", 0.0)
    height, width = size
    rows, columns = torch.meshgrid(torch.arange(height) / 100, torch.arange(width) / 100, indexing="ij")
    image = torch.stack([rows, columns, torch.zeros(size)])
    shifted = ThreeForms(size)(image.expand(COUNT, -1, -1, -1))[0][:COUNT]
    middle = shifted[:, :2, height // 2, width // 2] * 100
    shift = middle - torch.tensor([height // 2, width // 2])
    assert torch.allclose(shift, shift.round(), atol=1e-3)
    assert (shift.abs().amax(dim=0).round() == torch.tensor(size) // 16).all()


def test_colours_change_by_no_more_than_a_tenth(monkeypatch) -> None:
    monkeypatch.setattr(augmentation, "SHIFT", 0.0)
    grey = torch.full((COUNT, 3, 64, 64), 0.5)
    change = ThreeForms((64, 64))(grey)[0][:COUNT] - 0.5
    # Of grey that is even, contrast, saturation and hue change nothing.
    assert 0.045 < change.abs().max() <= 0.05 + 1e-5
    jitter = ThreeForms((64, 64)).jitter
    assert [jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue] == [0.1] * 4


def test_what_is_pasted_has_a_colour_of_its_own() -> None:
    """On an even image nothing else would be seen; hue is moved by hue alone, value by the other three."""
    even = torch.tensor([0.3, 0.6, 0.4])[:, None, None].expand(COUNT, 3, 64, 64)
    normal, *spoiled = ThreeForms((64, 64))(even)[0].chunk(3)
    hue, _, value = rgb_to_hsv(normal).unbind(dim=1)
    for form in spoiled:
        pasted = (form != normal).any(dim=1)
        assert pasted.any(dim=(1, 2)).all()
        its_hue, _, its_value = rgb_to_hsv(form).unbind(dim=1)
        turns = (its_hue - hue)[pasted] / (2 * math.pi)
        ratios = (its_value / value)[pasted]
        assert 0.09 < turns.abs().max() <= 0.1 + 1e-4
        assert 0.9**3 < ratios.min() < 0.92
        assert 1.08 < ratios.max() < 1.1**3


# ---- Gaussian --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "dim"), [(40, 6), (5, 12)], ids=["many", "fewer than dimensions"])
def test_gaussian_is_that_of_numpy_and_scikit_learn(count: int, dim: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(3, 1, (count, dim)) @ rng.normal(0, 1, (dim, dim))
    moments = Moments.of(torch.from_numpy(x[:3])).plus(Moments.of(torch.from_numpy(x[3:])))
    gaussian = Gaussian(dim).double()
    gaussian.fit(moments)

    covariance = np.cov(x, rowvar=False, bias=True)
    share = OAS().fit(x).shrinkage_
    covariance = (1 - share) * covariance + share * np.trace(covariance) / dim * np.eye(dim)
    queries = rng.normal(3, 2, (7, dim))
    expected = [(q - x.mean(0)) @ np.linalg.inv(covariance) @ (q - x.mean(0)) / 2 for q in queries]
    np.testing.assert_allclose(gaussian(torch.from_numpy(queries)).numpy(), expected, rtol=1e-9)


def test_equal_features_have_a_gaussian_too() -> None:
    gaussian = Gaussian(3)
    gaussian.fit(Moments.of(torch.ones(4, 3)))
    scores = gaussian(torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.1, 1.0]]))
    assert scores.isfinite().all()
    assert scores[0] == 0 < scores[1]


# ---- scores and maps -------------------------------------------------------------------------------------------------


def test_grad_cam_is_that_of_backpropagation() -> None:
    model = fitted((64, 96))
    images = torch.rand(2, 3, 64, 96)
    features = model.encode(images).detach().requires_grad_()
    model.gaussian(features.mean(dim=(2, 3))).sum().backward()
    weights = features.grad.mean(dim=(2, 3), keepdim=True)
    expected = (weights * features.detach()).sum(dim=1).relu()
    with torch.no_grad():
        gradients = model.gaussian.gradient(features.mean(dim=(2, 3)))
        got = grad_cam(features, gradients, (2, 3))  # the size of the feature maps: nothing is interpolated
    torch.testing.assert_close(got[:, 0], expected)
    assert expected.max() > 0


def test_patches_are_scored_as_if_each_was_an_image() -> None:
    model = fitted((64, 72), patch_size=32)
    image = torch.rand(1, 3, 64, 72)
    with torch.no_grad():
        encoded = model.encode(image)
        alone = model.encoder(2 * image[..., 8:40, 20:52] - 1).mean(dim=(2, 3))
        scores = model(image)
    assert encoded.shape == (1, 512, 9, 11)
    torch.testing.assert_close(encoded[..., 2, 5], alone)
    assert scores.pred_score.item() == pytest.approx(model.gaussian(model.features(image)).max().item(), rel=1e-5)
    assert 0 <= scores.anomaly_map.min() < scores.anomaly_map.max() <= scores.pred_score.item() * (1 + 1e-6)


def test_a_pixel_gets_the_mean_of_the_patches_that_hold_it_weighed_by_a_gaussian() -> None:
    distances = torch.rand(1, 1, 3, 4)
    got = spread_to_pixels(distances, patch_size=8, stride=4, size=(18, 21))
    assert got.shape == (1, 1, 18, 21)
    for y, x in ((0, 0), (7, 9), (15, 19), (11, 4)):
        total = weights = 0.0
        for row in range(3):
            for column in range(4):
                dy, dx = y - 4 * row, x - 4 * column
                if 0 <= dy < 8 and 0 <= dx < 8:
                    weight = math.exp(-((dy - 3.5) ** 2 + (dx - 3.5) ** 2) / (2 * 2.0**2))
                    total, weights = total + weight * distances[0, 0, row, column].item(), weights + weight
        assert got[0, 0, y, x].item() == pytest.approx(total / weights, rel=1e-5)
    assert torch.equal(got[..., 16:, :20], got[..., 15:16, :20].expand(-1, -1, 2, -1))


def test_features_are_in_float32_also_where_training_is_in_bf16() -> None:
    model = fitted()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            got = model(images)
    assert torch.equal(got.pred_score, expected.pred_score)
    assert torch.equal(got.anomaly_map, expected.anomaly_map)


def test_all_weights_are_drawn_anew_and_trained() -> None:
    model = CutPasteModel((64, 64))
    first = {name: weight.clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # the last norm of a block begins at zero, and what is below it learns in the second step
        images, labels = ThreeForms((64, 64))(torch.rand(2, 3, 64, 64))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.classify(images), labels).backward()
        optimizer.step()
    assert [name for name, weight in model.named_parameters() if torch.equal(weight, first[name])] == []
    other = CutPasteModel((64, 64))
    for one in (model, other):
        torch.manual_seed(1)
        one.reset_parameters()
    assert all(torch.equal(*weights) for weights in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (((63, 256), None), "63 x 256 pixels are too small: height and width must be at least 64"),
        (((64, 64), 31), "patch_size must be a whole number from 32 to 64, .* got 31"),
        (((64, 96), 65), "patch_size must be a whole number from 32 to 64, .* got 65"),
        (((64, 96), 32.5), "patch_size must be a whole number"),
    ],
)
def test_sizes_that_do_not_do_are_refused(sizes: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CutPasteModel(*sizes)


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"no Gaussian.* go on with its training"):
        CutPasteModel((64, 64)).eval()(torch.rand(1, 3, 64, 64))
    model = fitted()
    with pytest.raises(ValueError, match=r"\(B, 3, 64, 64\): resize the images"):
        model(torch.rand(1, 3, 64, 96))
    with pytest.raises(ValueError, match=r"needs values in \[0, 1\]"):
        model(2 * torch.rand(1, 3, 64, 64))
