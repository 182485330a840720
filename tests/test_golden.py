# SPDX-License-Identifier: Apache-2.0
"""The numbers of models with fixed weights on fixed images, against those in ``golden/``.

They guard against silent change, from reading an image to its score. Where a change is meant, write them anew with
``python -m tests.test_golden`` and the name of the model, and say in the commit why they changed.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import PredictDataset
from lightning.pytorch import Trainer
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_intra import InTra, OnePassInTra
from anomalib_intra.components.reconstruction_module import ReconstructionModule
from anomalib_intra.data.normal_images import NormalImages

from .conftest import tiny_engine

GOLDEN = Path(__file__).parent / "golden"
SIZES = {"image_size": (32, 48), "patch_size": 8, "embed_dim": 16, "num_heads": 2}
MODELS = {
    "intra": lambda: InTra(**SIZES, window_size=3, depth=3),
    "one_pass": lambda: OnePassInTra(**SIZES, depth=2),
}


def fixed_model(kind: str) -> ReconstructionModule:
    """Weights from a generator whose stream NumPy never changes, so that they never depend on PyTorch's."""
    model = MODELS[kind]()
    stream = np.random.RandomState(2104)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            # InTra paints pixels as they are, the one-pass model normalised ones, which are 0 in the mean.
            grey = 0.5 if name == "to_pixels.bias" and kind == "intra" else 0.0
            # As after a training, the one-pass model's head holds what it sees for normal, and tells it from a hole.
            bias = -16.0 if name == "comparison.neighbours.3.bias" else grey
            offset = 1.0 if "norm" in name and name.endswith("weight") else bias
            spread = 0.3 if name == "comparison.neighbours.3.weight" else 0.1
            parameter.copy_(torch.from_numpy(offset + spread * stream.standard_normal(tuple(parameter.shape))))
    return model


def fixed_images(folder: Path, numbers: range, hole: bool = False) -> DataLoader:
    """Waves, in files of another size than the model's."""
    folder.mkdir()
    y, x = np.mgrid[:40, :60]
    for number in numbers:
        waves = [np.sin(x / (2 + colour) + y / 5 + number) * np.cos(y / (3 + colour)) for colour in range(3)]
        image = np.stack(waves, axis=-1) / 2 + 0.5
        if hole:
            image[12:22, 30:42] = 0.1
        Image.fromarray((image * 255).round().astype(np.uint8)).save(folder / f"{number}.png")
    dataset = PredictDataset(folder)
    return DataLoader(dataset, batch_size=len(dataset), collate_fn=dataset.collate_fn)


def compute(kind: str, folder: Path) -> dict[str, np.ndarray]:
    """Calibrate the model on five images and one that is held out, and score another with and without a hole."""
    model, engine = fixed_model(kind), tiny_engine(folder / "results", logger=False)
    model.trainer = Trainer(accelerator="cpu", logger=False)
    training, held_out = fixed_images(folder / "training", range(5)), fixed_images(folder / "held_out", range(5, 6))
    whole, broken = (fixed_images(folder / str(hole), range(6, 7), hole) for hole in (False, True))
    model.eval()._calibrate(NormalImages(training, training, held_out, held_out, same_every_epoch=True))
    batches = [batch for loader in (whole, broken) for batch in engine.predict(model, dataloaders=loader)]
    return {
        "reconstruction": torch.cat([batch.reconstruction for batch in batches]).numpy(),
        "difference_map": torch.cat([batch.difference for batch in batches]).numpy(),
        "training_mean": model.post_processor.training_mean.numpy(),
        "thresholds": torch.stack([model.post_processor.image_threshold, model.post_processor.pixel_threshold]).numpy(),
        "anomaly_map": torch.cat([batch.anomaly_map for batch in batches]).float().numpy(),
        "score": torch.cat([batch.pred_score for batch in batches]).numpy(),
    }


@pytest.fixture(scope="module", params=MODELS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """What is computed now, and what is stored."""
    with np.load(GOLDEN / f"{request.param}.npz", allow_pickle=False) as golden:
        return compute(request.param, tmp_path_factory.mktemp("golden")), dict(golden)


def test_golden_file_holds_numbers_that_tell_images_apart(both: tuple[dict, dict]) -> None:
    _, golden = both
    assert 0.05 < golden["reconstruction"].std() < 1
    assert golden["difference_map"].std() > 0.01
    assert np.ptp(golden["score"]) > 0.05


@pytest.mark.parametrize(
    "name", ["reconstruction", "difference_map", "training_mean", "thresholds", "anomaly_map", "score"]
)
def test_numbers_are_those_of_the_golden_file(both: tuple[dict, dict], name: str) -> None:
    computed, golden = both
    # Other processors add up in another order, which moves a value of about 1 by some 1e-6.
    np.testing.assert_allclose(computed[name], golden[name], rtol=0, atol=1e-5)


if __name__ == "__main__":
    (name,) = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        np.savez_compressed(GOLDEN / f"{name}.npz", **compute(name, Path(folder)))
    print(f"{name}.npz written")
