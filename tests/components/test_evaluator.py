# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is tested with any metrics, whichever it was trained with."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

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


def test_raw_scores_rank_in_their_order_whichever_batches_they_come_in() -> None:
    """Of scores outside [0, 1], torchmetrics takes those of the batch for logits, and 40 and 50 for the same."""
    evaluator = SelectiveEvaluator(PaperEvaluator(decisions=False))
    model = SimpleNamespace(post_processor=SimpleNamespace(enable_normalization=False))
    for scores, labels in (([0.7, 0.9], [0, 1]), ([2.0, 40.0], [1, 0]), ([50.0, 3e-9], [1, 0])):
        maps = torch.tensor(scores)[:, None, None, None].expand(-1, 1, 4, 4)
        batch = UnroundedBatch(
            image=torch.rand(2, 3, 4, 4),
            pred_score=torch.tensor(scores),
            anomaly_map=maps,
            gt_label=torch.tensor(labels),
            gt_mask=torch.tensor(labels)[:, None, None].expand(-1, 4, 4),
        )
        evaluator.on_test_batch_end(None, model, None, batch, 0)
        assert batch.pred_score.tolist() == torch.tensor(scores).tolist()  # as it was
    figures = {metric.name: metric.compute() for metric in evaluator.test_metrics if metric.name.endswith("AUROC")}
    assert figures["image_AUROC"] == figures["pixel_AUROC"] == pytest.approx(7 / 9)  # 40 lies above 0.9 and 2
