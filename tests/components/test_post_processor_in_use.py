# SPDX-License-Identifier: Apache-2.0
"""The post-processor in use: exact metrics, decisions, thresholds, calibration and original size."""

import numpy as np
import pytest
import torch
from anomalib.metrics import AUROC
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Pad

from anomalib_intra import InTraPostProcessor
from anomalib_intra.components.anomaly_map import difference_map
from anomalib_intra.components.batch import InTraBatch

from ..conftest import compared, tiny_intra, tiny_one_pass, tiny_riad


def calibrated(side=16, image=None, pixel=None, **options):
    pp = InTraPostProcessor(**options)
    pp.set_training_mean(torch.zeros(1, 1, side, side))
    if image is not None:
        pp._image_threshold.fill_(image)
    if pixel is not None:
        pp._pixel_threshold.fill_(pixel)
    return pp


def hard_values(count, seed=0):
    """float32 scores in 1e-12 .. 1 with one-ulp neighbours and exact ties, shuffled."""
    rng = np.random.default_rng(seed)
    base = (10.0 ** rng.uniform(-12, 0, count // 2)).astype(np.float32)
    near = np.nextafter(base, np.where(rng.random(len(base)) < 0.5, 0, 1).astype(np.float32)).astype(np.float32)
    values = np.concatenate([base, near])
    values[:4] = values[4:8]
    values[-2:] = 1.0, np.nextafter(np.float32(1), np.float32(0))
    rng.shuffle(values)
    return torch.from_numpy(values)


def processed(monkeypatch, pp, maps, gt_label=None, gt_mask=None):
    """Run given raw maps (B, 1, H, W) through post_process_batch."""
    monkeypatch.setattr(pp, "raw_anomaly_map", lambda differences: maps.clone())
    blank = torch.zeros(len(maps), 3, *maps.shape[-2:])
    batch = InTraBatch(image=blank, gt_label=gt_label, gt_mask=gt_mask, difference=blank[:, :1])
    batch.update(reconstruction=blank)
    pp.post_process_batch(batch)
    return batch


def auroc(fields, batches):
    metric = AUROC(fields=fields)
    for batch in batches:
        metric.update(batch)
    return metric.compute()


@pytest.mark.parametrize("threshold", [0.003, 1e-7, 1e-9, 0.0, 0.9, float("nan")])
def test_auroc_through_post_process_batch_is_that_of_raw_values_exactly(monkeypatch, threshold):
    values = hard_values(40 * 16)
    maps = values.reshape(40, 1, 4, 4)
    rng = np.random.default_rng(1)
    label = torch.from_numpy(rng.random(40) < 0.5)
    # Ties that decide: neighbours of one ulp are labelled apart.
    mask = torch.from_numpy(rng.random((40, 4, 4)) < 0.5)
    pp = calibrated(4, threshold, threshold)
    raw = InTraBatch(image=torch.zeros(40, 3, 4, 4), gt_label=label, gt_mask=mask, difference=torch.zeros(40, 1, 4, 4))
    raw.update(pred_score=maps.amax(dim=(1, 2, 3)), anomaly_map=maps)
    done = processed(monkeypatch, pp, maps, label, mask)
    assert len(torch.unique(done.anomaly_map)) == len(torch.unique(values))
    for fields in (["pred_score", "gt_label"], ["anomaly_map", "gt_mask"]):
        assert auroc(fields, [done]) == auroc(fields, [raw])


@pytest.mark.parametrize("enable_normalization", [True, False])
def test_labels_are_raw_above_threshold_even_one_ulp_away(monkeypatch, enable_normalization):
    threshold = np.float32(0.003)
    values = torch.tensor(
        [np.nextafter(threshold, np.float32(0)), threshold, np.nextafter(threshold, np.float32(1)), 0.0, 1.0]
    )
    pp = calibrated(1, 0.003, 0.003, enable_normalization=enable_normalization)
    batch = processed(monkeypatch, pp, values.view(5, 1, 1, 1))
    expected = [False, False, True, False, True]
    assert batch.pred_label.tolist() == expected
    assert batch.pred_mask.flatten().tolist() == expected
    if enable_normalization:
        assert batch.pred_score[1] == 0.5
        assert (batch.pred_score > 0.5).tolist() == expected
    else:
        assert torch.equal(batch.pred_score, values)


def test_forward_gives_what_post_process_batch_gives_in_float32():
    torch.manual_seed(0)
    images, reconstructions = torch.rand(2, 4, 3, 16, 24)
    pp = InTraPostProcessor()
    pp.set_training_mean(torch.full((1, 1, 16, 24), 0.1))
    pp._image_threshold.fill_(0.1)
    pp._pixel_threshold.fill_(0.05)
    batch = InTraBatch(image=images, difference=difference_map(images, reconstructions))
    pp.post_process_batch(batch)
    got = pp(compared(images, reconstructions))
    assert got.pred_score.dtype == got.anomaly_map.dtype == torch.float32
    assert torch.equal(got.pred_score, batch.pred_score.float())
    assert torch.equal(got.anomaly_map.squeeze(1), torch.as_tensor(batch.anomaly_map).float().squeeze(1))
    assert torch.equal(got.pred_label, batch.pred_label)
    assert torch.equal(got.pred_mask.squeeze(1), torch.as_tensor(batch.pred_mask).squeeze(1))


def test_without_thresholding_there_are_no_labels(monkeypatch):
    pp = calibrated(2, 0.5, 0.5, enable_thresholding=False)
    batch = processed(monkeypatch, pp, torch.rand(3, 1, 2, 2))
    assert batch.pred_label is None
    assert batch.pred_mask is None


def with_labels(monkeypatch, pp, maps, gt_label=None, gt_mask=None):
    monkeypatch.setattr(pp, "raw_anomaly_map", lambda differences: maps.clone())
    blank = torch.zeros(len(maps), 3, *maps.shape[-2:])
    pp.observe(InTraBatch(image=blank, gt_label=gt_label, gt_mask=gt_mask, difference=blank[:, :1]))


def quantile(values, q):
    values = sorted(values)
    place = (len(values) - 1) * q
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def best_f1(scores, labels):
    def f1(threshold):
        hits = sum(label for score, label in zip(scores, labels, strict=True) if score >= threshold)
        called = sum(score >= threshold for score in scores)
        return 2 * hits / (called + sum(labels))

    return max(scores, key=f1), f1


def test_quantiles_by_loop_without_labels_over_several_batches(monkeypatch):
    pp = calibrated(2, image_quantile=0.7, pixel_quantile=0.9)
    parts = torch.rand(7, 1, 2, 2, generator=torch.Generator().manual_seed(0)).split(3)
    for part in parts:
        with_labels(monkeypatch, pp, part)
    pp.set_thresholds()
    maps = torch.cat(parts)
    scores = [max(x.flatten().tolist()) for x in maps]
    assert pp.image_threshold.item() == pytest.approx(quantile(scores, 0.7), rel=1e-6)
    assert pp.pixel_threshold.item() == pytest.approx(quantile(maps.flatten().tolist(), 0.9), rel=1e-6)


def test_f1_threshold_is_optimal_by_brute_force(monkeypatch):
    pp = calibrated(2)
    generator = torch.Generator().manual_seed(1)
    maps = torch.rand(20, 1, 2, 2, generator=generator)
    label = torch.rand(20, generator=generator) < 0.4
    mask = label.view(20, 1, 1) & (torch.rand(20, 2, 2, generator=generator) < 0.7)
    with_labels(monkeypatch, pp, maps[:9], label[:9], mask[:9])
    with_labels(monkeypatch, pp, maps[9:], label[9:], mask[9:])
    pp.set_thresholds()
    for threshold, values, truth in (
        (pp.image_threshold, maps.amax(dim=(1, 2, 3)).tolist(), label.tolist()),
        (pp.pixel_threshold, maps.flatten().tolist(), mask.flatten().tolist()),
    ):
        best, f1 = best_f1(values, truth)
        assert f1(threshold.item()) == pytest.approx(f1(best))


def test_labelled_anomalies_without_masks_give_f1_for_images_and_a_normal_quantile_for_pixels(monkeypatch):
    pp = calibrated(2, pixel_quantile=0.8)
    maps = torch.rand(10, 1, 2, 2, generator=torch.Generator().manual_seed(2))
    label = torch.tensor([0, 1] * 5)
    with_labels(monkeypatch, pp, maps, label)
    pp.set_thresholds()
    scores = maps.amax(dim=(1, 2, 3)).tolist()
    best, f1 = best_f1(scores, label.tolist())
    assert f1(pp.image_threshold.item()) == pytest.approx(f1(best))
    assert pp.pixel_threshold.item() == pytest.approx(quantile(maps[label == 0].flatten().tolist(), 0.8), rel=1e-6)


def test_thresholds_are_replaced_by_the_next_observations_and_kept_without_any(monkeypatch):
    pp = calibrated(2, image_quantile=0.5)
    with_labels(monkeypatch, pp, torch.full((3, 1, 2, 2), 0.1))
    pp.set_thresholds()
    with_labels(monkeypatch, pp, torch.full((3, 1, 2, 2), 0.4))
    pp.set_thresholds()
    assert pp.image_threshold.item() == pytest.approx(0.4)
    pp.set_thresholds()
    assert pp.image_threshold.item() == pytest.approx(0.4)


def test_reset_forgets_observations_too(monkeypatch):
    pp = calibrated(2, image_quantile=0.5, pixel_quantile=0.5)
    with_labels(monkeypatch, pp, torch.full((3, 1, 2, 2), 0.9), torch.tensor([0, 0, 1]))
    pp.reset()
    pp.set_training_mean(torch.zeros(1, 1, 2, 2))
    with_labels(monkeypatch, pp, torch.full((3, 1, 2, 2), 0.1), torch.tensor([0, 0, 0]))
    pp.set_thresholds()
    assert pp.image_threshold.item() == pytest.approx(0.1)


def test_uncalibrated_refuses_every_way_in():
    images = torch.rand(1, 3, 16, 16)
    for name in ("observe", "post_process_batch"):
        with pytest.raises(RuntimeError, match="is not calibrated"):
            getattr(InTraPostProcessor(), name)(InTraBatch(image=images, difference=torch.zeros_like(images[:, :1])))


def test_equation_17_with_the_mean_over_several_training_images():
    torch.manual_seed(3)
    train, rebuilt = torch.rand(2, 3, 3, 16, 24)
    image, other = torch.rand(2, 1, 3, 16, 24)
    pp = InTraPostProcessor(enable_normalization=False)
    pp.set_training_mean(difference_map(train, rebuilt).mean(dim=0, keepdim=True))
    expected = difference_map(image, other).double()
    for n in range(3):
        expected = expected - difference_map(train[n : n + 1], rebuilt[n : n + 1]).double() / 3
    got = pp(compared(image, other)).anomaly_map.double().reshape(expected.shape)
    torch.testing.assert_close(got, expected**2, rtol=0, atol=1e-7)


@pytest.mark.parametrize("threshold", [float("nan"), 0.0, 0.003])
def test_black_images_give_finite_scores_whatever_the_threshold(threshold):
    black = torch.zeros(2, 3, 16, 16)
    got = calibrated(16, threshold, threshold)(compared(black, black))
    assert got.pred_score.isfinite().all()
    assert got.anomaly_map.isfinite().all()
    assert not got.pred_label.any()


def test_original_size_resizes_maps_before_taking_the_maximum(monkeypatch, tmp_path):
    paths = []
    for n in range(2):
        paths.append(str(tmp_path / f"{n}.png"))
        Image.new("RGB", (30, 20)).save(paths[-1])
    pp = calibrated(4, original_size=True, enable_normalization=False)
    maps = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(4))
    monkeypatch.setattr(pp, "raw_anomaly_map", lambda differences: maps)
    batch = InTraBatch(image=torch.zeros(2, 3, 4, 4), image_path=paths, difference=torch.zeros(2, 1, 4, 4))
    batch.update(reconstruction=batch.image)
    pp.post_process_batch(batch)
    assert batch.anomaly_map.shape[-2:] == (20, 30)
    assert torch.equal(batch.pred_score, torch.as_tensor(batch.anomaly_map).amax(dim=(-2, -1)).flatten())
    assert (batch.pred_score < maps.amax(dim=(1, 2, 3))).any()


@pytest.mark.parametrize(("side", "way"), [(8, CenterCrop(4)), (2, Pad(1))], ids=["cropped", "padded"])
def test_a_share_of_the_pixels_is_of_those_the_model_sees(monkeypatch, tmp_path, side, way):
    Image.new("RGB", (side, side)).save(tmp_path / "part.png")
    pp = calibrated(4, original_size=True, score_share=0.125, enable_normalization=False)
    pp._gone_through = [way]
    maps = torch.zeros(1, 1, 4, 4)
    maps[..., 1, 1:3] = torch.tensor([0.7, 0.3])  # an eighth of what the model sees
    monkeypatch.setattr(pp, "raw_anomaly_map", lambda differences: maps)
    batch = InTraBatch(
        image=torch.zeros(1, 3, 4, 4), image_path=[str(tmp_path / "part.png")], difference=torch.zeros(1, 1, 4, 4)
    )
    batch.update(reconstruction=batch.image)
    pp.post_process_batch(batch)
    assert batch.anomaly_map.shape[-2:] == (side, side)
    assert float(batch.pred_score) == pytest.approx(0.5)


def test_models_may_be_given_the_same_post_processor():
    given = InTraPostProcessor(image_quantile=0.95)
    one, other, third = (make(post_processor=given) for make in (tiny_one_pass, tiny_intra, tiny_riad))
    fresh = tiny_intra(post_processor=InTraPostProcessor(image_quantile=0.95)).post_processor
    assert other.post_processor.checkpoint_config() == fresh.checkpoint_config()
    assert other.post_processor.raw_display_scale == fresh.raw_display_scale
    one.post_processor.set_training_mean(torch.zeros(1, 1, 64, 64))
    assert one.is_calibrated
    assert not other.is_calibrated
    assert third.post_processor.image_quantile == 0.95
