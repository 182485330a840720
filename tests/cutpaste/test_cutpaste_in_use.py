# SPDX-License-Identifier: Apache-2.0
"""CutPaste as users run it: trained, resumed, saved, loaded, predicted with and exported."""

import logging
import math
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import ImageBatch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback, Trainer, seed_everything

from anomalib_intra import CutPaste, InTraPostProcessor, MVTec, TextureDemo, UnsaturatedPostProcessor
from anomalib_intra.cutpaste import augmentation
from anomalib_intra.cutpaste.gaussian import Gaussian, Moments
from anomalib_intra.cutpaste.torch_model import FEATURE_DIM
from anomalib_intra.metrics import PaperEvaluator

from ..conftest import CONFIGS, Run, tiny_cutpaste, tiny_engine, train_and_test


@pytest.fixture(scope="module")
def of_images(few_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model of whole images, trained for an epoch of three steps."""
    seed_everything(0)
    return train_and_test(tiny_cutpaste(), tmp_path_factory.mktemp("of_images"), few_root, 1)


def images_of(few: TextureDemo) -> torch.Tensor:
    few.setup()
    return torch.as_tensor(next(iter(few.test_dataloader())).image[:3])


# ---- training --------------------------------------------------------------------------------------------------------


def test_training_learns_to_tell_the_forms_apart_and_finds_anomalies(trained_cutpaste: Run) -> None:
    losses = [epoch["train_loss"] for epoch in trained_cutpaste.model.losses]
    assert len(losses) == 6
    assert losses[-1] < 0.8 * math.log(3)
    assert trained_cutpaste.metrics["image_AUROC"] > 0.8
    assert trained_cutpaste.metrics["pixel_AUROC"] > 0.7


def test_gaussian_is_that_of_the_training_images_with_the_weights_that_are_tested(of_images: Run, few) -> None:
    few.setup()
    images = torch.stack([torch.as_tensor(item.image) for item in few.train_data])
    model = of_images.model.eval()
    with torch.no_grad():
        features = model.model.features(model.pre_processor(images))
    torch.testing.assert_close(model.model.gaussian.mean, features.mean(dim=0), rtol=0, atol=1e-5)
    assert not torch.isnan(model.post_processor.image_threshold)


def test_the_optimizer_is_that_of_the_paper() -> None:
    optimizer = tiny_cutpaste().configure_optimizers()["optimizer"]
    assert type(optimizer) is torch.optim.SGD
    assert (optimizer.defaults["momentum"], optimizer.defaults["weight_decay"]) == (0.9, 3e-5)


def batches_of(normal: torch.Tensor) -> list[ImageBatch]:
    """A batch of normal images, and one without."""
    return [ImageBatch(image=normal), ImageBatch(image=torch.rand(1, 3, 64, 64), gt_label=torch.tensor([1]))]


def test_gaussian_leaves_batches_without_normal_images_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = tiny_cutpaste().eval(), torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    expected = Gaussian(FEATURE_DIM)
    with torch.no_grad():
        of_images = Moments.of(model.model.features(images))
        expected.fit(of_images)
        model.learn_normal(batches_of(images))
        assert torch.equal(model.model.gaussian.mean, expected.mean)
        # A process without images, beside one with these.
        of_other = iter(of_images)
        monkeypatch.setattr(model.trainer.strategy, "reduce", lambda part, reduce_op: part + next(of_other))
        model.forget_calibration()
        model.learn_normal([])
    assert torch.equal(model.model.gaussian.mean, expected.mean)
    assert torch.equal(model.model.gaussian.whitening, expected.whitening)


def test_learning_rate_is_half_a_cosine_and_validation_loss_that_of_the_same_forms(few, tmp_path: Path) -> None:
    rates, losses = [], []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        def on_train_epoch_end(self, trainer: Trainer, pl_module: CutPaste) -> None:
            losses.append(trainer.callback_metrics["val_loss"].item())

    class Still(CutPaste):
        def training_step(self, *args: object, **kwargs: object) -> torch.Tensor:
            super().training_step(*args, **kwargs)  # random numbers are drawn, the running means do not count
            self.model.load_state_dict(weights)
            return sum(weight.sum() for weight in self.model.parameters()) * 0

    seed_everything(1)
    model = Still((64, 64), samples_per_image=1, images_per_step=6, visualizer=False, learning_rate=0.5)
    weights = {name: value.clone() for name, value in model.model.state_dict().items()}
    tiny_engine(tmp_path, max_epochs=2, callbacks=[Watch()]).fit(model, datamodule=few)
    expected = [0.25 * (1 + math.cos(math.pi * step / 6)) for step in range(1, 7)]
    assert rates == pytest.approx(expected, abs=1e-6)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_every_held_out_image_has_forms_of_its_own_the_same_in_each_epoch(few, tmp_path: Path, monkeypatch) -> None:
    boxes = []

    class Notes(CutPaste):
        def validation_step(self, *args: object) -> ImageBatch:
            with monkeypatch.context() as patch:
                patch.setattr(augmentation, "patches", self.noted)
                return super().validation_step(*args)

        @staticmethod
        def noted(count: int, size: tuple[int, int]) -> augmentation.Boxes:
            boxes.append(draw(count, size))
            return boxes[-1]

    draw = augmentation.patches
    model = Notes((64, 64), samples_per_image=1, images_per_step=6, visualizer=False)
    tiny_engine(tmp_path, max_epochs=2, limit_train_batches=1, logger=False).fit(model, datamodule=few)
    first, second, again_first, again_second = (torch.cat([x.flatten() for x in one]) for one in boxes)
    assert not torch.equal(first, second)
    assert torch.equal(first, again_first)
    assert torch.equal(second, again_second)


def test_max_time_ends_a_run_within_an_epoch_and_its_learning_rate_follows(few, tmp_path: Path, monkeypatch) -> None:
    rates, now = [], 0.0

    class Clock(Callback):
        def on_train_batch_start(self, *_: object) -> None:
            nonlocal now
            now += 1

        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", SimpleNamespace(monotonic=lambda: now))
    seed_everything(1)
    model = tiny_cutpaste(learning_rate=0.5)  # three steps an epoch
    engine = tiny_engine(tmp_path, max_epochs=-1, max_time="00:00:00:05", callbacks=[Clock()])
    engine.fit(model, datamodule=few)
    expected = [0.25 * (1 + math.cos(math.pi * second / 5)) for second in range(1, 6)]
    assert rates == pytest.approx(expected, abs=1e-6)
    assert [set(epoch) for epoch in model.losses] == [{"epoch", "train_loss", "val_loss"}] * 2
    assert model.is_calibrated


class CrashError(Exception):
    pass


class CrashesInTheSecondEpoch(Callback):
    def on_train_epoch_start(self, trainer: Trainer, *_: object) -> None:
        if trainer.current_epoch == 1:
            raise CrashError


class IsInterrupted(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == 4:  # of three an epoch
            os.kill(os.getpid(), signal.SIGINT)


class CrashesWhenCalibrated(Callback):
    def on_train_end(self, trainer: Trainer, pl_module: CutPaste) -> None:
        def crash(_: object) -> None:
            raise CrashError

        pl_module.learn_normal = crash


@pytest.mark.parametrize(
    ("cut", "name"),
    [(CrashesInTheSecondEpoch, "model"), (IsInterrupted, "last"), (CrashesWhenCalibrated, "last")],
)
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_cut(
    few: TextureDemo, tmp_path: Path, cut: type[Callback], name: str
) -> None:
    def fit(root: Path, *callbacks: Callback, ckpt_path: Path | None = None) -> CutPaste:
        seed_everything(5)
        model = tiny_cutpaste()
        engine = tiny_engine(root, max_epochs=2, callbacks=list(callbacks))
        engine.fit(model, datamodule=few, ckpt_path=ckpt_path)
        return model

    uncut = fit(tmp_path / "uncut")
    with pytest.raises((CrashError, KeyboardInterrupt, SystemExit)):
        fit(tmp_path / "cut", cut())
    (last,) = (tmp_path / "cut").rglob(f"{name}.ckpt")
    assert (
        torch.load(last, weights_only=True)["global_step"]
        == {"model": 3, "last": 4 if cut is IsInterrupted else 6}[name]
    )
    resumed = fit(tmp_path / "resumed", ckpt_path=last)
    (kept,) = (tmp_path / "resumed").rglob("model.ckpt")
    for model in (resumed, CutPaste.load_from_checkpoint(kept)):
        for key, value in uncut.state_dict().items():
            assert torch.equal(value.nan_to_num(), model.state_dict()[key].nan_to_num()), key


# ---- saving, prediction, export --------------------------------------------------------------------------------------


def test_checkpoint_scores_the_same_again(trained_cutpaste: Run, few: TextureDemo, tmp_path: Path) -> None:
    loaded = CutPaste.load_from_checkpoint(trained_cutpaste.checkpoint).eval()
    images = images_of(few)
    with torch.no_grad():
        first, second = (trained_cutpaste.model.eval()(images) for _ in range(2))
        again = loaded(images)
    for other in (second, again):
        assert torch.equal(first.pred_score, other.pred_score)
        assert torch.equal(first.anomaly_map, other.anomaly_map)
        assert torch.equal(first.pred_mask, other.pred_mask)
    path = few.root / "weave/test/hole/000.png"
    (batch,) = tiny_engine(tmp_path).predict(loaded, data_path=path, ckpt_path=trained_cutpaste.checkpoint)
    with torch.no_grad():
        expected = loaded(torch.as_tensor(batch.image))
    torch.testing.assert_close(batch.pred_score.float(), expected.pred_score, rtol=0, atol=1e-6)


def test_onnx_and_openvino_score_like_the_model_of_images(of_images: Run, few: TextureDemo, tmp_path: Path) -> None:
    onnxruntime, openvino = (pytest.importorskip(name) for name in ("onnxruntime", "openvino"))
    model = of_images.model.eval()
    path = tiny_engine(tmp_path).export(model, "onnx", export_root=tmp_path)
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = images_of(few)
    for batch in (images, images[:1]):
        with torch.no_grad():
            expected = model(batch)
        assert expected.anomaly_map.std() > 0.01
        of_onnx = dict(zip(names, session.run(names, {"input": batch.numpy()}), strict=True))
        for got in (of_onnx, compiled(batch.numpy())):
            np.testing.assert_allclose(got["pred_score"], expected.pred_score, rtol=0, atol=1e-3)
            np.testing.assert_allclose(got["anomaly_map"], expected.anomaly_map, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("given", "message"), [(None, "32 (here None)"), (32, "None (here 32)")])
def test_a_checkpoint_of_the_other_model_is_refused(given: int | None, message: str, request, few, tmp_path) -> None:
    """Both have weights of the same shapes."""
    other = request.getfixturevalue("of_images" if given else "trained_cutpaste")
    with pytest.raises(ValueError, match=re.escape(f"another CutPaste, with patch_size={message}")):
        tiny_engine(tmp_path).test(tiny_cutpaste(patch_size=given), datamodule=few, ckpt_path=other.checkpoint)


def test_thresholds_follow_quantiles_that_a_test_is_given_and_the_gaussian_stays(
    of_images: Run, few: TextureDemo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_cutpaste(post_processor=UnsaturatedPostProcessor(image_quantile=0.0, pixel_quantile=0.5))
    model.learn_normal = None  # is not called
    before = CutPaste.load_from_checkpoint(of_images.checkpoint)
    with caplog.at_level(logging.WARNING):
        tiny_engine(tmp_path, logger=False).test(model, datamodule=few, ckpt_path=of_images.checkpoint)
    assert "calibrated with image_quantile=0.99 (here 0.0), pixel_quantile=0.999 (here 0.5)" in caplog.text
    assert torch.equal(model.model.gaussian.mean, before.model.gaussian.mean)
    with torch.no_grad():
        held_out = before.model.eval()(torch.stack([torch.as_tensor(item.image) for item in few.val_data]))
    expected = held_out.pred_score.min(), held_out.anomaly_map.quantile(0.5)
    found = model.post_processor.image_threshold, model.post_processor.pixel_threshold
    assert [float(x) for x in found] == pytest.approx([float(x) for x in expected], rel=1e-4)


def test_what_has_no_thresholds_says_so_and_is_not_exported(
    of_images: Run, few: TextureDemo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_cutpaste(post_processor=UnsaturatedPostProcessor(image_quantile=0.5))
    engine = tiny_engine(tmp_path, logger=False)
    one = few.root / "weave/test/hole/000.png"
    with caplog.at_level(logging.WARNING):
        engine.predict(model, data_path=one, ckpt_path=of_images.checkpoint)
    assert "no image is called anomalous. Those of a checkpoint are left out" in caplog.text
    with pytest.raises(RuntimeError, match=r"no thresholds, so it is not exported.*leave the quantiles out"):
        engine.export(model, "onnx", export_root=tmp_path)
    raw = UnsaturatedPostProcessor(image_quantile=0.5, enable_thresholding=False, enable_normalization=False)
    (batch,) = engine.predict(tiny_cutpaste(post_processor=raw), data_path=one, ckpt_path=of_images.checkpoint)
    assert batch.pred_label is None


# ---- what it is built with -------------------------------------------------------------------------------------------


def test_config_holds_the_defaults(tmp_path: Path) -> None:
    arguments = ["train", "--config", str(CONFIGS / "cutpaste.yaml"), "--default_root_dir", str(tmp_path)]
    built = AnomalibCLI(arguments, run=False)
    assert isinstance(built.model, CutPaste)
    names = [[metric.name for metric in one.test_metrics] for one in (built.model.evaluator, PaperEvaluator())]
    assert names[0] == names[1]
    assert isinstance(built.datamodule, MVTec)
    given, default = ({**model.hparams, "evaluator": None} for model in (built.model, CutPaste()))
    assert given == default


def test_wrong_components_and_arguments_are_refused() -> None:
    for other in (PostProcessor(), InTraPostProcessor()):
        with pytest.raises(TypeError, match="UnsaturatedPostProcessor"):
            tiny_cutpaste(post_processor=other)
    with pytest.raises(ValueError, match="images_per_step must be a whole number of at least 1"):
        tiny_cutpaste(images_per_step=0)
    with pytest.raises(ValueError, match="at least 64"):
        tiny_cutpaste(image_size=(32, 64))


def test_images_of_another_size_are_refused(of_images: Run) -> None:
    with pytest.raises(ValueError, match="resize the images"):
        of_images.model.test_step(ImageBatch(image=torch.rand(1, 3, 64, 128)))
