# SPDX-License-Identifier: Apache-2.0
"""The same run gives the same numbers, and an image the same score in any company."""

from pathlib import Path

import pytest
import torch
from anomalib.engine import Engine
from lightning.pytorch import seed_everything
from torch.utils.data import DataLoader, Subset

from anomalib_intra import TextureDemo
from anomalib_intra.components.reconstruction_module import ReconstructionModule

from .conftest import tiny_engine, tiny_intra, tiny_one_pass

KINDS = {"InTra": tiny_intra, "OnePassInTra": tiny_one_pass}


def run(
    kind: str, demo_root: Path, results: Path, workers: int
) -> tuple[ReconstructionModule, Engine, list[dict[str, float]], dict]:
    seed_everything(7, workers=True)
    model, engine = KINDS[kind](), tiny_engine(results, max_epochs=1)
    datamodule = TextureDemo(demo_root, num_workers=workers)
    metrics = engine.train(model, datamodule=datamodule)
    return model, engine, metrics, by_path(engine.predict(model, datamodule=datamodule))


def by_path(predictions: list) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Score and map of each image."""
    return {
        path: (score, anomaly_map)
        for batch in predictions
        for path, score, anomaly_map in zip(batch.image_path, batch.pred_score, batch.anomaly_map, strict=True)
    }


@pytest.fixture(scope="module", params=KINDS)
def reference(request: pytest.FixtureRequest, demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    return request.param, *run(request.param, demo_root, tmp_path_factory.mktemp("reference"), workers=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_repeated_gives_the_same_bits_also_with_workers(
    reference: tuple, demo_root: Path, tmp_path: Path, workers: int
) -> None:
    kind, model, _, metrics, predictions = reference
    again, _, metrics_again, predictions_again = run(kind, demo_root, tmp_path, workers)
    state = again.state_dict()
    for name, value in model.state_dict().items():  # weights, training mean, thresholds; NaN where there is nothing
        assert torch.allclose(value, state[name], rtol=0, atol=0, equal_nan=True), name
    assert metrics_again == metrics
    assert list(predictions_again) == list(predictions)
    for path, values in predictions.items():
        assert all(map(torch.equal, values, predictions_again[path])), path


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_scores_depend_neither_on_batch_size_nor_on_order(reference: tuple, demo_root: Path, batch_size: int) -> None:
    _, model, engine, _, expected = reference  # in batches of 32
    datamodule = TextureDemo(demo_root, num_workers=0, eval_batch_size=batch_size)
    in_batches = by_path(engine.predict(model, datamodule=datamodule))

    dataset = datamodule.test_data
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(batch_size)).tolist()
    loader = DataLoader(Subset(dataset, order), batch_size=batch_size, collate_fn=dataset.collate_fn)
    permuted = by_path(engine.predict(model, dataloaders=loader))
    assert list(permuted) != list(expected)
    assert set(permuted) == set(in_batches) == set(expected)
    for path, (score, anomaly_map) in expected.items():
        for score_now, map_now in (in_batches[path], permuted[path]):
            assert score_now.item() == pytest.approx(score.item(), abs=1e-6)
            # Of 4096 pixels, some lie where normalization is steepest: up to 1.5e-6 with some matrix products.
            torch.testing.assert_close(map_now, anomaly_map, rtol=0, atol=1e-5)
