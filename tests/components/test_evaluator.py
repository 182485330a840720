# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is tested with any metrics, whichever it was trained with."""

from pathlib import Path

import pytest

from anomalib_intra import TextureDemo
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
