# SPDX-License-Identifier: Apache-2.0
"""Eq. 16-18 against plain float64 loops; scores without new ties; thresholds."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUROC, F1AdaptiveThreshold

from anomalib_intra import InTraPostProcessor, UnsaturatedPostProcessor
from anomalib_intra.components.anomaly_map import _scaled_kernel, difference_map, image_score
from anomalib_intra.components.batch import InTraBatch
from anomalib_intra.components.reconstruction import Comparison
from anomalib_intra.components.reconstruction_post_processor import PAPERS_MAP

from ..conftest import compared
from ..reference import gms_difference, halved, resized


def reflect(n: int, length: int) -> int:
    if n < 0:
        return -n
    return 2 * (length - 1) - n if n >= length else n


def filtered(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    height, width = image.shape
    half = len(kernel) // 2
    out = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            for a in range(-half, half + 1):
                for b in range(-half, half + 1):
                    out[y, x] += kernel[a + half, b + half] * image[reflect(y + a, height), reflect(x + b, width)]
    return out


def reference_map(image: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Eq. 16, for images of shape (3, H, W)."""
    height, width = image.shape[1:]
    maps = []
    for at_512 in (21, 11):
        image, other = halved(image), halved(other)
        size = at_512 * min(height, width) / 512
        kernel = max(3, min(range(1, 99, 2), key=lambda odd, size=size: abs(odd - size)))
        weights = np.array([math.exp(-((n - kernel // 2) ** 2) / (2 * 2.0**2)) for n in range(kernel)])
        gauss = np.outer(weights, weights) / weights.sum() ** 2
        averaged = filtered(gms_difference(image, other), np.full((kernel, kernel), 1 / kernel**2))
        maps.append(resized(filtered(averaged, gauss), (height, width)))
    return (maps[0] + maps[1]) / 2


@pytest.mark.parametrize("size", [(48, 48), (32, 80), (144, 128)])
def test_difference_map_is_equation_16(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.random((2, 3, size[0] // 8, size[1] // 8)), np.ones((1, 1, 8, 8)))
    image, other = 0.7 * smooth + 0.3 * rng.random((2, 3, *size))
    got = difference_map(*(torch.tensor(x[None], dtype=torch.float32) for x in (image, other)))
    assert got.shape == (1, 1, *size)
    np.testing.assert_allclose(got[0, 0].numpy(), reference_map(image, other), atol=2e-6)


@pytest.mark.parametrize(
    ("size", "half", "quarter"), [(512, 21, 11), (320, 13, 7), (256, 11, 5), (128, 5, 3), (32, 3, 3)]
)
def test_kernels_scale_with_the_image(size: int, half: int, quarter: int) -> None:
    assert (_scaled_kernel(21, size), _scaled_kernel(11, size)) == (half, quarter)


def test_colour_term_sees_what_the_gradient_term_does_not() -> None:
    image = torch.full((1, 3, 64, 64), 0.5)
    other = image.clone()
    other[:, 0] += 0.25  # redder everywhere: no gradient changes
    assert difference_map(image, other).max() < 1e-6
    coloured = difference_map(image, other, colour_weight=0.4)
    torch.testing.assert_close(coloured, torch.full_like(coloured, 0.4 * 0.25 / 3))
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(2, 1, 3, 64, 64, generator=rng)
    plain, both, colour = (difference_map(*images, weight) for weight in (0.0, 0.3, 1.0))
    torch.testing.assert_close(both, 0.7 * plain + 0.3 * colour)


def test_deviations_other_than_the_papers() -> None:
    rng = torch.Generator().manual_seed(0)
    images, reconstructions = torch.rand(2, 3, 3, 32, 48, generator=rng)
    mean, std = torch.rand(2, 1, 1, 32, 48, generator=rng) / 2
    maps = {}
    for deviation in ("squared", "positive", "scaled", "raw"):
        post_processor = InTraPostProcessor(enable_normalization=False, deviation=deviation)
        post_processor.set_training_mean(mean, std)
        maps[deviation] = post_processor.raw_anomaly_map(difference_map(images, reconstructions))
    less = difference_map(images, reconstructions) < mean
    assert less.any()
    assert (~less).any()
    assert torch.equal(maps["positive"], torch.where(less, 0, maps["squared"]))
    expected = maps["squared"] * (2 * std.mean() / (std + std.mean())) ** 2
    torch.testing.assert_close(maps["scaled"], expected)
    assert torch.equal(maps["raw"], difference_map(images, reconstructions))


@pytest.mark.parametrize(("share", "pixels"), [(0.0, 1), (1e-9, 1), (0.1, 154), (1.0, 1536)])
def test_score_is_the_mean_of_the_highest_share_of_the_pixels(share: float, pixels: int) -> None:
    differences = torch.rand(3, 1, 32, 48, generator=torch.Generator().manual_seed(0))
    post_processor = InTraPostProcessor(enable_normalization=False, deviation="raw", score_share=share)
    post_processor.set_training_mean(torch.zeros(1, 1, 32, 48))
    images = torch.zeros(3, 3, 32, 48)
    got = post_processor(Comparison(images, images, differences)).pred_score
    expected = [sum(sorted(one.flatten().tolist())[-pixels:]) / pixels for one in differences]
    assert got.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"colour_weight": 1.5}, {"colour_weight": -0.1}, {"deviation": "signed"}, {"score_share": 2.0}]
)
def test_options_have_their_values(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        InTraPostProcessor(**wrong)


def test_anomaly_map_and_score_are_equations_17_and_18() -> None:
    torch.manual_seed(0)
    images, reconstructions = torch.rand(2, 3, 3, 32, 48)
    mean = torch.rand(1, 1, 32, 48)
    post_processor = InTraPostProcessor(enable_normalization=False)
    post_processor.set_training_mean(mean)
    difference = difference_map(images, reconstructions).double()
    got = post_processor(compared(images, reconstructions))
    for n in range(3):
        largest = 0.0
        for y in range(32):
            for x in range(48):
                expected = (float(difference[n, 0, y, x]) - float(mean[0, 0, y, x])) ** 2
                assert float(got.anomaly_map[n, 0, y, x]) == pytest.approx(expected, abs=1e-7)
                largest = max(largest, expected)
        assert float(got.pred_score[n]) == pytest.approx(largest, abs=1e-7)


def test_constant_black_images_give_finite_maps() -> None:
    black = torch.zeros(1, 3, 32, 32)
    assert torch.isfinite(difference_map(black, black)).all()


def hard_scores() -> torch.Tensor:
    """Scores over twelve decades, many of them next to each other in float32, and some equal."""
    rng = np.random.default_rng(0)
    base = (10.0 ** rng.uniform(-12, 0, 3000)).astype(np.float32)
    return torch.from_numpy(np.concatenate([base, np.nextafter(base, np.float32(0)), base[:500], [0, 1]]).astype("f"))


@pytest.mark.parametrize("threshold", [1e-5, 0.003, 0.2])
def test_normalization_makes_no_ties_and_keeps_the_order(threshold: float) -> None:
    raw = hard_scores()
    normalized = InTraPostProcessor._normalize(raw, torch.tensor(threshold))
    order = raw.argsort(stable=True)
    steps, raw_steps = normalized[order].diff(), raw[order].diff()
    assert ((steps > 0) == (raw_steps > 0)).all()
    assert (steps >= 0).all()
    assert normalized.min() >= 0
    assert normalized.max() < 1
    middle = InTraPostProcessor._normalize(torch.tensor(threshold), torch.tensor(threshold))
    assert middle == 0.5


def test_auroc_of_normalized_scores_is_that_of_raw_scores_to_the_last_digit() -> None:
    raw = hard_scores()
    labels = torch.from_numpy(np.random.default_rng(1).random(len(raw)) < 0.5)
    images = torch.zeros(len(raw), 3, 1, 1)

    def auroc(scores: torch.Tensor) -> float:
        metric = AUROC(fields=["pred_score", "gt_label"])
        batch = InTraBatch(image=images, gt_label=labels)
        batch.update(pred_score=scores)
        metric.update(batch)
        return float(metric.compute())

    normalized = InTraPostProcessor._normalize(raw, torch.tensor(0.003))
    assert auroc(normalized) == auroc(raw)
    assert auroc(normalized.float().round(decimals=2)) != auroc(raw)  # the test can see ties


def calibrated(**kwargs: object) -> InTraPostProcessor:
    post_processor = InTraPostProcessor(**kwargs)
    post_processor.set_training_mean(torch.zeros(1, 1, 32, 32))
    return post_processor


def batch_of(count: int, labels: list[int] | None = None, seed: int = 0) -> InTraBatch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 32, 32, generator=generator)
    reconstructions = images + torch.linspace(0.02, 0.6, count).view(-1, 1, 1, 1) * torch.rand(
        images.shape, generator=generator
    )
    masks = None if labels is None else torch.zeros(count, 32, 32, dtype=torch.bool)
    if labels is not None:
        for n, label in enumerate(labels):
            masks[n, 8:20, 8:20] = bool(label)
    return InTraBatch(
        image=images,
        gt_label=None if labels is None else torch.tensor(labels),
        gt_mask=masks,
        reconstruction=reconstructions,
        difference=difference_map(images, reconstructions),
    )


def test_thresholds_of_normal_images_are_quantiles() -> None:
    post_processor = calibrated(image_quantile=0.75, pixel_quantile=0.9)
    batches = [batch_of(5, [0] * 5, seed) for seed in (0, 1)]
    for batch in batches:
        post_processor.observe(batch)
    post_processor.set_thresholds()
    maps = torch.cat([post_processor.raw_anomaly_map(b.difference) for b in batches])
    scores = maps.amax(dim=(1, 2, 3)).numpy()
    assert float(post_processor.image_threshold) == pytest.approx(np.quantile(scores, 0.75), rel=1e-6)
    assert float(post_processor.pixel_threshold) == pytest.approx(np.quantile(maps.numpy(), 0.9), rel=1e-6)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0] * 19, "by only 19 normal images: about one good part in 20, or more, will be called anomalous. Hold out"),
        ([0], "by only 1 normal image: about one good part in 2,"),
        ([0] * 20, ""),
        ([0, 0, 1], ""),  # anomalies decide
    ],
)
def test_a_threshold_of_few_images_says_what_it_is_worth(
    labels: list[int], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    post_processor = calibrated()
    post_processor.observe(batch_of(len(labels), labels))
    post_processor.set_thresholds()
    assert len(caplog.messages) == bool(said)
    assert said in caplog.text


@pytest.mark.parametrize(("level", "decides"), [(-20.0, "even odds"), (4.0, "quantile")])
def test_of_logits_no_pixel_is_anomalous_that_is_more_likely_normal(level: float, decides: str) -> None:
    post_processor = InTraPostProcessor(deviation="half", enable_normalization=False, pixel_quantile=0.9)
    torch.manual_seed(0)
    logits = level + torch.randn(4, 1, 32, 32)
    post_processor.set_training_mean(torch.full((1, 1, 32, 32), -8.0))
    batch = batch_of(4, [0] * 4)
    batch.update(difference=logits)
    post_processor.observe(batch)
    post_processor.set_thresholds()
    # At even odds the logit is 0; half the training mean is taken off before the softplus.
    expected = {"even odds": np.log1p(np.exp(4.0)), "quantile": np.quantile(np.log1p(np.exp(logits + 4.0)), 0.9)}
    assert float(post_processor.pixel_threshold) == pytest.approx(expected[decides], rel=1e-5)
    assert float(post_processor.image_threshold) == pytest.approx(
        np.quantile(np.log1p(np.exp(logits + 4.0)).amax(dim=(1, 2, 3)), 0.99), rel=1e-5
    )
    differences = torch.tensor([[-0.01, 0.01]]).expand(1, 1, 32, 2).repeat(1, 1, 1, 16)
    masks = post_processor(Comparison(batch.image[:1], batch.image[:1], differences)).pred_mask
    assert torch.equal(masks, (differences > 0) & (decides == "even odds"))


def test_labelled_anomalies_decide_whatever_the_odds() -> None:
    post_processor = InTraPostProcessor(deviation="half")
    post_processor.set_training_mean(torch.full((1, 1, 32, 32), -8.0))
    batch = batch_of(8, [0, 1, 0, 0, 1, 0, 1, 1])
    batch.update(difference=-12 + 2 * batch.gt_mask[:, None].float())
    post_processor.observe(batch)
    post_processor.set_thresholds()
    assert float(post_processor.pixel_threshold) == pytest.approx(np.log1p(np.exp(-6.0)), rel=1e-4)


def test_thresholds_of_raw_scores_far_above_one_are_such_scores() -> None:
    post_processor = UnsaturatedPostProcessor()
    scores = torch.tensor([3.0, 20.0, 30.0, 50.0])
    labels = torch.tensor([0, 0, 1, 1])
    maps, masks = (x[:, None, None].expand(-1, 8, 8) for x in (scores, labels))
    batch = ImageBatch(torch.rand(4, 3, 8, 8), pred_score=scores, gt_label=labels, anomaly_map=maps, gt_mask=masks)
    post_processor.observe(batch)
    post_processor.set_thresholds()
    assert post_processor.image_threshold == post_processor.pixel_threshold == 30


def test_thresholds_with_labelled_anomalies_are_those_of_the_best_f1() -> None:
    post_processor = calibrated()
    batch = batch_of(8, [0, 1, 0, 0, 1, 0, 1, 1])
    post_processor.observe(batch)
    post_processor.set_thresholds()
    for field, truth, threshold in (
        ("pred_score", "gt_label", post_processor.image_threshold),
        ("anomaly_map", "gt_mask", post_processor.pixel_threshold),
    ):
        metric = F1AdaptiveThreshold(fields=[field, truth])
        metric.update(batch)
        assert threshold == metric.compute()


@pytest.mark.parametrize("normalize", [True, False])
def test_decisions_follow_threshold_and_sensitivity(normalize: bool) -> None:
    labels = {}
    for sensitivity in (0.3, 0.5, 0.7):
        post_processor = calibrated(enable_normalization=normalize, image_sensitivity=sensitivity)
        post_processor._image_threshold.fill_(0.004)
        post_processor._pixel_threshold.fill_(0.002)
        batch = batch_of(12)
        raw = image_score(post_processor.raw_anomaly_map(batch.difference))
        post_processor.post_process_batch(batch)
        labels[sensitivity] = batch.pred_label
        assert torch.equal(batch.pred_label, raw > 0.004 * (1 - sensitivity) / sensitivity)
        if normalize:
            assert torch.equal(batch.pred_label, batch.pred_score > 1 - sensitivity)
            assert batch.pred_score.dtype == batch.anomaly_map.dtype == torch.float64
            assert torch.equal(batch.pred_mask, batch.anomaly_map > 0.5)
    assert labels[0.3].sum() < labels[0.5].sum() < labels[0.7].sum()


def test_uncalibrated_post_processor_says_what_to_do() -> None:
    images = torch.rand(1, 3, 32, 32)
    with pytest.raises(RuntimeError, match=r"is not calibrated, .*go on with its training"):
        InTraPostProcessor()(compared(images, images))


def test_images_of_another_size_than_the_mean_are_refused() -> None:
    images = torch.rand(1, 3, 48, 32)
    with pytest.raises(ValueError, match=r"48 x 32 .* 32 x 32"):
        calibrated()(compared(images, images))


def test_state_survives_saving_and_reset_forgets_it(tmp_path: Path) -> None:
    post_processor = calibrated()
    post_processor.set_training_mean(torch.rand(1, 1, 32, 32))
    post_processor._image_threshold.fill_(0.25)
    torch.save(post_processor.state_dict(), tmp_path / "state.pt")
    fresh = InTraPostProcessor()
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fresh.training_mean, post_processor.training_mean)
    assert fresh.image_threshold == 0.25
    fresh.reset()
    assert not fresh.is_calibrated
    assert torch.isnan(fresh.image_threshold)
    # A calibrated one takes over the state of one that is not.
    post_processor.load_state_dict(fresh.state_dict())
    assert not post_processor.is_calibrated


OTHER = {
    "enable_normalization": (True, False),
    "enable_thresholding": (True, False),
    "image_sensitivity": (0.5, 0.7),
    "pixel_sensitivity": (0.5, 0.7),
    "image_quantile": (0.99, 0.9),
    "pixel_quantile": (0.999, 0.9),
    "original_size": (False, True),
    "colour_weight": (0.0, 0.5),
    "deviation": ("squared", "positive"),
    "score_share": (0.0, 0.01),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_setting_that_is_given_outlives_a_checkpoint_and_none_is_as_in_the_checkpoint(name: str) -> None:
    default, other = OTHER[name]
    for saved, given, expected in ((other, None, other), (other, default, default), (default, other, other)):
        for kind in (InTraPostProcessor, UnsaturatedPostProcessor):
            if kind is UnsaturatedPostProcessor and name in ("original_size", *PAPERS_MAP):
                continue
            post_processor = kind(**{name: given})
            assert getattr(post_processor, name) == (default if given is None else given)
            post_processor.load_checkpoint_config(kind(**{name: saved}).checkpoint_config())
            assert getattr(post_processor, name) == expected


@pytest.mark.parametrize("name", ["image_sensitivity", "pixel_sensitivity", "image_quantile", "pixel_quantile"])
@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
def test_what_is_no_share_is_refused(name: str, wrong: float) -> None:
    for kind in (InTraPostProcessor, UnsaturatedPostProcessor):
        with pytest.raises(ValueError, match=rf"{name} must be in .*got {wrong}"):
            kind(**{name: wrong})


@pytest.mark.parametrize("name", ["image_sensitivity", "pixel_sensitivity"])
def test_sensitivities_of_nothing_and_of_everything_are_refused(name: str) -> None:
    for wrong in (0.0, 1.0):
        with pytest.raises(ValueError, match=rf"{name} must be in \(0, 1\)"):
            InTraPostProcessor(**{name: wrong})


def test_options_of_the_map_asked_for_now_outlive_a_checkpoint_with_others() -> None:
    saved = InTraPostProcessor(colour_weight=0.5, deviation="positive").checkpoint_config()
    for asked, expected in (
        ({}, (0.5, "positive")),
        ({"deviation": "scaled"}, (0.5, "scaled")),
        ({"colour_weight": 0.25}, (0.25, "positive")),
        ({"colour_weight": 0.0, "deviation": "squared"}, (0.0, "squared")),
    ):
        post_processor = InTraPostProcessor(**asked)
        post_processor.load_checkpoint_config(saved)
        assert (post_processor.colour_weight, post_processor.deviation) == expected
