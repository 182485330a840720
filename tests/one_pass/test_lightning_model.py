# SPDX-License-Identifier: Apache-2.0
"""The one-pass model in use: training, resume, test, prediction, export, checkpoints."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import PredictDataset
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader

from anomalib_intra import InTraPostProcessor, OnePassInTra, TextureDemo
from anomalib_intra.components.anomaly_map import difference_map
from anomalib_intra.data.images import sample_images
from anomalib_intra.training import checkpoints

from ..conftest import tiny_engine

TINY = {"image_size": (64, 64), "embed_dim": 32, "depth": 2, "num_heads": 2, "minutes": None}


def tiny(**options: object) -> OnePassInTra:
    return OnePassInTra(**{**TINY, **options})


@pytest.fixture(scope="module")
def trained(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    seed_everything(0)
    model, engine = tiny(), tiny_engine(tmp_path_factory.mktemp("one_pass"), max_epochs=6)
    metrics = engine.train(model, datamodule=TextureDemo(demo_root, num_workers=0))
    return model, engine, metrics[0]


def test_it_learns_and_is_tested(trained: tuple) -> None:
    model, engine, metrics = trained
    assert metrics["image_AUROC"] > 0.8
    assert metrics["pixel_AUROC"] > 0.8
    losses = [row["val_loss"] for row in model.losses]
    assert losses[-1] < 0.6 * losses[0]
    pictures = list(Path(engine.trainer.default_root_dir).glob("images/**/*.png"))
    assert len(pictures) > 10


def test_difference_maps_are_logits_of_the_head_and_equation_16_of_all_radii(trained: tuple) -> None:
    model = copy.deepcopy(trained[0]).eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        compared, painting = model.compare(images), model.model(images)
    expected = torch.zeros(2, 1, 64, 64, dtype=torch.float64)
    for number in range(3):
        expected += 5 * difference_map(images, painting.painted[:, number]).double() / 3
        logits = painting.suspicion[:, number : number + 1]
        expected += torch.nn.functional.interpolate(logits, (64, 64), mode="bilinear").double() / 3
    torch.testing.assert_close(compared.difference.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compared.reconstruction, painting.painted.mean(dim=1))
    raw = model.post_processor.raw_anomaly_map(compared.difference)
    mean = model.post_processor.training_mean.double()
    torch.testing.assert_close(raw.double(), torch.log1p(torch.exp(expected - mean / 2)), rtol=1e-5, atol=1e-6)


def test_a_run_that_was_cut_ends_as_an_uncut_one_bit_for_bit(demo_root: Path, tmp_path: Path, monkeypatch) -> None:
    class CrashError(Exception):
        pass

    class CrashesWithinTheSecondEpoch(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
            if trainer.current_epoch == 1 and trainer.global_step == 70:
                raise CrashError

    def run(folder: str, ckpt_path: Path | None = None, callbacks: tuple[Callback, ...] = ()) -> OnePassInTra:
        seed_everything(3)
        model = tiny(visualizer=False)
        engine = tiny_engine(tmp_path / folder, callbacks=list(callbacks), logger=False)
        engine.fit(model, datamodule=TextureDemo(demo_root, num_workers=0), ckpt_path=ckpt_path)
        return model

    uncut = run("uncut")
    monkeypatch.setattr(checkpoints, "_MOST_LOST", -1.0)  # saves after every step
    with pytest.raises(CrashError):
        run("cut", callbacks=(CrashesWithinTheSecondEpoch(),))
    (last,) = (tmp_path / "cut").rglob("v0/**/last.ckpt")
    resumed = run("resumed", last)
    for name, value in uncut.state_dict().items():
        assert torch.equal(value.nan_to_num(), resumed.state_dict()[name].nan_to_num()), name


def test_training_to_a_time_ends_there_with_the_learning_rate_down(demo_root: Path, tmp_path: Path) -> None:
    model = tiny(minutes=0.02, visualizer=False)
    engine = tiny_engine(tmp_path, max_epochs=1000, logger=False)
    engine.fit(model, datamodule=TextureDemo(demo_root, num_workers=0))
    assert model.progress == 1.0
    assert 1.2 <= model._seconds < 10
    assert engine.trainer.optimizers[0].param_groups[0]["lr"] < 0.1 * model.learning_rate
    assert model.is_calibrated


def test_prediction_from_a_checkpoint_equals_that_of_the_model(trained: tuple, demo_root: Path, tmp_path: Path) -> None:
    model, engine, _ = trained
    loaded = OnePassInTra.load_from_checkpoint(engine.best_model_path)
    images = PredictDataset(demo_root / "weave/test/good")
    scores = []
    for one in (copy.deepcopy(model), loaded):
        loader = DataLoader(images, batch_size=3, collate_fn=images.collate_fn)
        batches = tiny_engine(tmp_path, logger=False).predict(one, dataloaders=loader)
        scores.append(torch.cat([batch.pred_score for batch in batches]))
    assert torch.equal(*scores)


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_exports_score_like_the_model(trained: tuple, tmp_path: Path, kind: str) -> None:
    model = copy.deepcopy(trained[0]).eval()
    images = torch.rand(2, 3, 80, 100, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(images)
    path = tiny_engine(tmp_path, logger=False).export(model, kind, export_root=tmp_path)
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        names = [output.name for output in session.get_outputs()]
        outputs = dict(zip(names, session.run(None, {session.get_inputs()[0].name: images.numpy()}), strict=True))
    else:
        import openvino as ov

        compiled = ov.compile_model(path, config={"INFERENCE_PRECISION_HINT": "f32"})
        outputs = {output.any_name: value for output, value in compiled(images.numpy()).items()}
    np.testing.assert_allclose(outputs["pred_score"].ravel(), expected.pred_score.numpy(), atol=1e-3)
    np.testing.assert_allclose(
        outputs["anomaly_map"].reshape(2, 64, 64), expected.anomaly_map.numpy().reshape(2, 64, 64), atol=1e-3
    )


def test_gradients_are_finite_where_images_are_constant() -> None:
    model = tiny()
    for value in (0.0, 0.5, 1.0):
        samples = sample_images(torch.full((2, 3, 64, 64), value), 1, torch.Generator().manual_seed(0))
        loss = model.loss_of(samples)
        loss.backward()
        assert loss.isfinite()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())


def test_a_checkpoint_of_another_architecture_is_refused(trained: tuple, demo: TextureDemo, tmp_path: Path) -> None:
    other = tiny(radii=(0, 1))
    with pytest.raises(ValueError, match=r"another OnePassInTra, with radii=\(0, 1, 2\) \(here \(0, 1\)\)"):
        tiny_engine(tmp_path).test(other, datamodule=demo, ckpt_path=trained[1].best_model_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"minutes": 0}, "minutes must be more than 0"), ({"radii": (0, 9)}, "radii"), ({"num_heads": 3}, "num_heads")],
)
def test_what_does_not_work_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_the_post_processor_is_made_for_logits() -> None:
    assert tiny().post_processor.deviation == "half"
    assert isinstance(tiny().post_processor, InTraPostProcessor)
