# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is tested with any metrics, whichever it was trained with."""

from pathlib import Path

import pytest
import torch
from anomalib.data import Folder
from anomalib.metrics import Evaluator

from anomalib_intra import TextureDemo
from anomalib_intra.components.batch import UnroundedBatch
from anomalib_intra.components.evaluator import SelectiveEvaluator
from anomalib_intra.metrics import PaperEvaluator

from ..conftest import tiny_engine, tiny_intra


@pytest.mark.parametrize("papers", ["trained", "tested"])
def test_metrics_are_those_of_the_test_and_not_of_the_checkpoint(papers: str, demo_root: Path, tmp_path: Path) -> None:
    data = TextureDemo(demo_root, num_workers=0)
    first, second = (tiny_intra(evaluator=PaperEvaluator() if papers == x else True) for x in ("trained", "tested"))
    engine = tiny_engine(tmp_path / "trained", max_epochs=1, limit_train_batches=1)
    engine.fit(first, datamodule=data)
    (metrics,) = tiny_engine(tmp_path / "tested").test(second, datamodule=data, ckpt_path=engine.best_model_path)
    assert "image_AUROC" in metrics
    assert ("pixel_AUPRO" in metrics) == (papers == "tested")


@pytest.mark.parametrize(
    ("kept", "left_out", "absent"),
    [
        ("good", {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score", "pixel_AUPRO"}, "anomalous"),
        ("bad", {"image_AUROC", "image_F1Score", "good_PSNR"}, "normal"),
    ],
)
def test_what_compares_both_kinds_of_images_is_left_out_of_a_test_of_one(
    kept: str, left_out: set[str], absent: str, demo_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Torchmetrics says 0 of them, as if the model had failed."""
    model = tiny_intra(evaluator=PaperEvaluator())
    data = TextureDemo(demo_root, num_workers=0)
    engine = tiny_engine(tmp_path, max_epochs=1, limit_train_batches=1)
    engine.fit(model, datamodule=data)
    both = engine.test(model, datamodule=data)[0]
    every = data.test_data.samples
    data.test_data.samples = every[every.label_index == (kept == "bad")]
    (metrics,) = engine.test(model, datamodule=data)
    assert both.keys() - metrics.keys() == left_out
    assert f"no {absent} images, so image_AUROC, image_F1Score" in caplog.text
    data.test_data.samples = every
    assert engine.test(model, datamodule=data)[0] == both  # nothing is left over from the test before


def test_pixels_are_left_out_without_masks_and_without_a_warning(
    few_root: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    (good,) = few_root.rglob("train/good")
    folders = {"normal_dir": good, "abnormal_dir": good.parents[1] / "test" / "hole", "val_split_mode": "none"}
    data = Folder("parts", **folders, num_workers=0)
    model = tiny_intra(evaluator=PaperEvaluator())
    (metrics,) = tiny_engine(tmp_path, max_epochs=1, limit_train_batches=1).train(model, datamodule=data)
    assert metrics.keys() >= {"image_AUROC", "image_F1Score"}
    assert not any(name.startswith("pixel_") for name in metrics)
    assert not any("was called before the ``update``" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize("stage", ["test", "validation"])
def test_raw_scores_rank_in_their_order_whichever_batches_they_come_in(stage: str) -> None:
    """Of scores above 1, torchmetrics takes those of the batch for logits, and 40 and 50 for the same."""
    metrics = PaperEvaluator(decisions=False).test_metrics
    evaluator = SelectiveEvaluator(Evaluator(val_metrics=list(metrics), test_metrics=list(metrics)))
    for scores, labels in (([0.7, 0.9], [0, 1]), ([2.0, 40.0], [1, 0]), ([50.0, 3e-9], [1, 0])):
        batch = UnroundedBatch(
            image=torch.rand(2, 3, 4, 4),
            pred_score=torch.tensor(scores),
            anomaly_map=torch.tensor(scores)[:, None, None, None].expand(-1, 1, 4, 4),
            gt_label=torch.tensor(labels),
            gt_mask=torch.tensor(labels)[:, None, None].expand(-1, 4, 4),
        )
        getattr(evaluator, f"on_{stage}_batch_end")(None, None, None, batch, 0)
    figures = {metric.name: metric.compute() for metric in metrics if metric.name.endswith("AUROC")}
    assert figures["image_AUROC"] == figures["pixel_AUROC"] == pytest.approx(7 / 9)  # 40 lies above 0.9 and 2
