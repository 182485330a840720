# SPDX-License-Identifier: Apache-2.0
"""The PSNR of good images, and the evaluator of the configs."""

import pytest
import torch
from sklearn.metrics import roc_auc_score

from anomalib_intra.components.batch import InTraBatch
from anomalib_intra.metrics import PSNR, PaperEvaluator


def test_psnr_is_that_of_normal_images_only() -> None:
    torch.manual_seed(0)
    images, reconstructions = torch.rand(2, 5, 3, 8, 8)
    metric = PSNR(prefix="good_")
    for part in (slice(0, 2), slice(2, 5)):
        labels = torch.tensor([0, 1, 1, 0, 0])[part]
        metric.update(InTraBatch(image=images[part], reconstruction=reconstructions[part], gt_label=labels))
    metric.update(InTraBatch(image=images[1:2], reconstruction=images[1:2], gt_label=torch.tensor([1])))
    error = ((images - reconstructions)[[0, 3, 4]] ** 2).mean()
    assert metric.name == "good_PSNR"
    assert metric.compute() == pytest.approx(float(10 * torch.log10(1 / error)), abs=1e-4)


def test_psnr_without_reconstructions_is_left_out() -> None:
    metric = PSNR()
    metric.update(InTraBatch(image=torch.rand(2, 3, 8, 8)))
    assert metric.compute() is None


def scored(count: int = 12) -> InTraBatch:
    torch.manual_seed(0)
    labels = torch.arange(count) % 2
    masks = torch.rand(count, 8, 8) < 0.3
    return InTraBatch(
        image=torch.rand(count, 3, 8, 8),
        reconstruction=torch.rand(count, 3, 8, 8),
        pred_score=torch.rand(count),
        pred_label=torch.rand(count) < 0.5,
        anomaly_map=torch.rand(count, 8, 8),
        pred_mask=torch.rand(count, 8, 8) < 0.5,
        gt_label=labels,
        gt_mask=masks & labels[:, None, None].bool(),
    )


def figures_of(evaluator: PaperEvaluator, batch: InTraBatch) -> dict[str, torch.Tensor | None]:
    for metric in evaluator.test_metrics:
        metric.update(batch)
    return {metric.name: metric.compute() for metric in evaluator.test_metrics}


def test_the_papers_evaluator_measures_images_pixels_and_reconstructions() -> None:
    batch = scored()
    figures = figures_of(PaperEvaluator(), batch)
    labels, masks = batch.gt_label.bool(), batch.gt_mask.bool()
    assert float(figures["image_AUROC"]) == pytest.approx(roc_auc_score(labels, batch.pred_score))
    assert float(figures["pixel_AUROC"]) == pytest.approx(roc_auc_score(masks.flatten(), batch.anomaly_map.flatten()))
    for level, called, true in (("image", batch.pred_label, labels), ("pixel", batch.pred_mask, masks)):
        f1 = 2 * (called & true).sum() / (called.sum() + true.sum())
        assert float(figures[f"{level}_F1Score"]) == pytest.approx(float(f1))
    assert 0 < float(figures["pixel_AUPRO"]) < 1
    error = ((batch.image - batch.reconstruction)[~labels] ** 2).mean()
    assert float(figures["good_PSNR"]) == pytest.approx(float(-10 * torch.log10(error)), abs=1e-4)


def test_scores_alone_are_the_same_without_the_decisions() -> None:
    figures = figures_of(PaperEvaluator(), scored())
    alone = figures_of(PaperEvaluator(decisions=False), scored())
    assert alone == {name: value for name, value in figures.items() if "F1" not in name}


def test_what_the_images_lack_is_left_out_but_not_a_label() -> None:
    batch = scored()
    batch.gt_mask = batch.reconstruction = None
    figures = figures_of(PaperEvaluator(), batch)
    assert {name for name, value in figures.items() if value is None} == {
        "pixel_AUROC", "pixel_F1Score", "pixel_AUPRO", "good_PSNR"
    }  # fmt: skip
    batch.gt_label = None
    with pytest.raises(ValueError, match="gt_label"):
        figures_of(PaperEvaluator(), batch)


def test_no_two_evaluators_share_a_metric() -> None:
    used, other = PaperEvaluator(), PaperEvaluator()
    figures_of(used, scored())
    assert all(metric.update_count == 0 for metric in other.test_metrics)
