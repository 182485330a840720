# SPDX-License-Identifier: Apache-2.0
"""InTra inside anomalib, from training to prediction on a bare image."""

import logging
from collections import Counter
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from anomalib.data import Folder, MVTecAD
from anomalib.data.utils import read_image
from anomalib.deploy import TorchInferencer
from anomalib.engine import Engine
from anomalib.metrics import AUROC
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, Trainer, seed_everything
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_intra import InTra, InTraPostProcessor, TextureDemo
from anomalib_intra.components.anomaly_map import difference_map

from ..conftest import Run, tiny_engine, tiny_intra


class Recorder(Callback):
    """Writes down losses and weights while a model trains."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.epochs: list[float] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: InTra) -> None:
        self.images = pl_module._images

    def on_train_batch_end(self, trainer: Trainer, pl_module: InTra, outputs: dict, *_: object) -> None:
        self.steps.append(float(outputs["loss"]))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: InTra) -> None:
        self.weights.append({k: v.clone() for k, v in pl_module.model.state_dict().items()})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: InTra) -> None:
        self.epochs.append(float(trainer.callback_metrics["val_loss"]))


class WorsensAfterFirstEpoch(Callback):
    """Spoils the weights, so that the first epoch stays the best."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: InTra) -> None:
        if trainer.current_epoch > 0:
            nn.init.normal_(pl_module.model.to_pixels.weight, std=3.0)


@pytest.fixture
def trained(
    trained_intra: Run, demo: TextureDemo, tmp_path: Path
) -> tuple[InTra, Engine, TextureDemo, Path, list[dict[str, float]]]:
    model, folder, metrics = trained_intra
    return deepcopy(model), tiny_engine(tmp_path / "trained"), demo, folder, [metrics]


def scores_of(predictions: list) -> dict[str, torch.Tensor]:
    return {Path(p).parent.name + Path(p).name: s for b in predictions
            for p, s in zip(b.image_path, b.pred_score, strict=True)}  # fmt: skip


def test_training_tests_and_draws(trained: tuple) -> None:
    model, _, _, run, results = trained
    assert set(results[0]) == {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"}
    assert (run / "weights/lightning/model.ckpt").is_file()
    assert (run / "weights/lightning/last.ckpt").is_file()
    for kind in ("good", "hole", "scratch", "smear", "displaced"):
        assert len(list((run / "images/test" / kind).glob("*.png"))) == (20 if kind == "good" else 8)
    with Image.open(run / "images/test/hole/000.png") as picture:
        assert picture.size == (4 * 256 + 3 * 4, 24 + 256)
    assert model.post_processor.training_mean.shape == (1, 1, 64, 64)
    assert not torch.isnan(model.post_processor.image_threshold)


def test_loss_falls(demo: TextureDemo, tmp_path: Path) -> None:
    seed_everything(0)
    recorder = Recorder()
    engine = tiny_engine(tmp_path, max_epochs=4, callbacks=[recorder])
    engine.fit(tiny_intra(windows_per_image=20), datamodule=demo)
    assert len(recorder.steps) == 4 * 34  # 54 images x 20 windows / 32
    assert sum(recorder.steps[-10:]) < 0.5 * sum(recorder.steps[:10])
    assert recorder.epochs[-1] < recorder.epochs[0]


def test_trained_loaded_and_bare_scores_are_the_same(trained: tuple, tmp_path: Path) -> None:
    model, engine, datamodule, run, _ = trained
    tested = scores_of(engine.predict(model, datamodule=datamodule))
    assert len(set(tested.values())) > 40

    loaded = InTra.load_from_checkpoint(run / "weights/lightning/model.ckpt")
    folder = datamodule.root / "weave/test/hole"
    predicted = scores_of(tiny_engine(tmp_path).predict(loaded, data_path=folder))
    loaded.eval()
    for path in sorted(folder.glob("*.png")):
        key = "hole" + path.name
        assert predicted[key] == pytest.approx(float(tested[key]), abs=1e-6)
        with torch.no_grad():
            bare = loaded(read_image(path, as_tensor=True)[None])
        assert bare.pred_score.item() == pytest.approx(float(tested[key]), abs=1e-6)
        assert bare.anomaly_map.shape == (1, 1, 64, 64)
        assert bare.pred_label.shape == (1,)


def test_command_line_style_test_of_a_checkpoint_gives_the_same_metrics(trained: tuple, tmp_path: Path, caplog) -> None:
    _, _, datamodule, run, results = trained
    again = tiny_engine(tmp_path).test(
        tiny_intra(), datamodule=datamodule, ckpt_path=run / "weights/lightning/model.ckpt"
    )
    assert again[0] == pytest.approx(results[0], abs=1e-6)
    assert "no training mean" not in caplog.text


def test_command_line_style_prediction_from_a_checkpoint(trained: tuple, tmp_path: Path) -> None:
    """Lightning loads the states of callbacks after the model's, and the post-processor is one of them."""
    _, _, datamodule, run, _ = trained
    checkpoint = run / "weights/lightning/model.ckpt"
    image = datamodule.root / "weave/test/hole/000.png"
    loaded = InTra.load_from_checkpoint(checkpoint).eval()
    (batch,) = tiny_engine(tmp_path).predict(tiny_intra(), data_path=image, ckpt_path=checkpoint)
    with torch.no_grad():
        expected = loaded(read_image(image, as_tensor=True)[None])
    assert batch.pred_score.item() == pytest.approx(expected.pred_score.item(), abs=1e-6)
    assert batch.pred_label.item() == expected.pred_label.item()


def test_best_weights_are_tested_and_calibrated(demo: TextureDemo, tmp_path: Path) -> None:
    seed_everything(0)
    recorder = Recorder()
    model = tiny_intra()
    tiny_engine(tmp_path, callbacks=[recorder, WorsensAfterFirstEpoch()]).fit(model, datamodule=demo)
    assert recorder.epochs[1] > recorder.epochs[0]
    for name, weight in model.model.state_dict().items():
        assert torch.equal(weight, recorder.weights[0][name])
    stored = torch.load(tmp_path / "InTra/TextureDemo/weave/v0/weights/lightning/model.ckpt", weights_only=True)
    assert stored["epoch"] == 0

    # The training mean is that of the best weights over the training images, and only those.
    maps = []
    for path in demo.train_data.samples.image_path:
        image = model.pre_processor(read_image(path, as_tensor=True)[None])
        maps.append(difference_map(image, model.model.reconstruct(image)))
    expected = torch.cat(maps).mean(dim=0, keepdim=True)
    std = torch.cat(maps).std(dim=0, correction=0, keepdim=True)
    assert len(maps) == 54
    torch.testing.assert_close(model.post_processor.training_std, std, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(model.post_processor.training_mean, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(stored["state_dict"]["post_processor.training_mean"], expected, atol=1e-6, rtol=0)


def test_options_of_the_map_come_back_with_a_checkpoint(demo: TextureDemo, tmp_path: Path) -> None:
    options = {"colour_weight": 0.25, "deviation": "scaled"}
    model = tiny_intra(post_processor=InTraPostProcessor(**options))
    engine = tiny_engine(tmp_path, max_epochs=1)
    engine.fit(model, datamodule=demo)
    image = read_image(demo.train_data.samples.image_path[0], as_tensor=True)[None]
    loaded = InTra.load_from_checkpoint(engine.best_model_path)
    assert (loaded.post_processor.colour_weight, loaded.post_processor.deviation) == (0.25, "scaled")
    with torch.inference_mode():
        assert torch.equal(loaded.eval()(image).anomaly_map, model.eval()(image).anomaly_map)


def test_patience_stops_training(demo: TextureDemo, tmp_path: Path) -> None:
    recorder = Recorder()
    engine = tiny_engine(tmp_path, max_epochs=20, callbacks=[recorder, WorsensAfterFirstEpoch()])
    engine.fit(tiny_intra(patience=2), datamodule=demo)
    assert len(recorder.epochs) == 3


def test_max_steps_ends_with_a_validation_and_a_checkpoint(demo: TextureDemo, tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path, max_epochs=-1, max_steps=3)
    engine.fit(tiny_intra(), datamodule=demo)
    assert engine.trainer.global_step == 3
    assert Path(engine.best_model_path).is_file()


def test_checkpoint_of_a_run_that_was_cut_off(
    demo: TextureDemo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = tiny_engine(tmp_path)
    engine.fit(tiny_intra(), datamodule=demo)
    cut_off = Path(engine.best_model_path).with_name("last.ckpt")

    model = InTra.load_from_checkpoint(cut_off)
    with pytest.raises(RuntimeError, match=r"is not calibrated, .* go on with its training"):
        model(torch.rand(1, 3, 64, 64))
    with pytest.raises(RuntimeError, match="is not calibrated"):
        tiny_engine(tmp_path / "p").predict(model, data_path=demo.root / "weave/test/hole/000.png")

    with caplog.at_level(logging.WARNING):
        results = tiny_engine(tmp_path / "t").test(model, datamodule=demo)
    assert "Computing it from the training images" in caplog.text
    assert model.post_processor.is_calibrated
    assert 0 <= results[0]["image_AUROC"] <= 1
    # As the error says: that very model scores images now, and the file still holds none of it.
    assert tiny_engine(tmp_path / "q").predict(model, data_path=demo.root / "weave/test/hole/000.png")
    assert not InTra.load_from_checkpoint(cut_off).is_calibrated


def test_metrics_are_those_of_raw_scores(trained: tuple, tmp_path: Path) -> None:
    _, _, datamodule, run, results = trained
    raw = InTra.load_from_checkpoint(run / "weights/lightning/model.ckpt", visualizer=False)
    raw.post_processor.enable_normalization = False
    again = tiny_engine(tmp_path).test(raw, datamodule=datamodule)
    assert again[0] == results[0]  # to the last digit


def test_original_size_compares_with_the_masks_of_the_files(trained: tuple, tmp_path: Path) -> None:
    _, _, datamodule, run, _ = trained
    seen = []

    class Look(AUROC):
        def update(self, batch: object) -> None:
            seen.append((batch.anomaly_map.shape, batch.gt_mask.shape, batch.gt_mask.sum(dim=(1, 2)), batch.image_path))

        def compute(self) -> torch.Tensor:
            return torch.tensor(0.0)

    loaded = InTra.load_from_checkpoint(run / "weights/lightning/model.ckpt", visualizer=False)
    loaded.post_processor.original_size = True
    loaded.evaluator.test_metrics.append(Look(fields=["anomaly_map", "gt_mask"]))
    datamodule.eval_batch_size = 7  # batches that begin with normal and with anomalous images
    tiny_engine(tmp_path).test(loaded, datamodule=datamodule)
    datamodule.eval_batch_size = 32
    for maps, masks, areas, paths in seen:
        assert maps[1:] == masks[1:] == (128, 128)
        for path, area in zip(paths, areas, strict=True):
            mask = Path(path.replace("/test/", "/ground_truth/").replace(".png", "_mask.png"))
            expected = (read_image(mask, as_tensor=True)[0] > 0).sum() if mask.exists() else 0
            assert area == expected


def test_mvtecad_default_split_warns_once_and_never_stops_on_test_images(
    demo_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    datamodule = MVTecAD(demo_root, category="weave", num_workers=0)
    model, recorder = tiny_intra(), Recorder()
    with caplog.at_level(logging.WARNING):
        tiny_engine(tmp_path, max_epochs=1, callbacks=[recorder]).fit(model, datamodule=datamodule)
    warnings = [r.message for r in caplog.records if "val_split_mode" in r.message]
    assert len(warnings) == 1
    assert "same_as_test" in warnings[0]
    assert "from_train" in warnings[0]
    held_out = {b for batch in recorder.images.held_out for b in batch.image_path}
    trained_on = {b for batch in recorder.images.training for b in batch.image_path}
    assert len(held_out) == 6
    assert len(trained_on) == 54
    assert not held_out & trained_on
    assert all("/train/" in path for path in held_out | trained_on)


def test_datamodule_without_validation_images(demo_root: Path, tmp_path: Path) -> None:
    datamodule = MVTecAD(demo_root, category="weave", num_workers=0, val_split_mode="none")
    model, recorder = tiny_intra(), Recorder()
    tiny_engine(tmp_path, max_epochs=1, callbacks=[recorder]).fit(model, datamodule=datamodule)
    assert len(recorder.images.held_out.dataset) == 6
    model.post_processor.reset()
    tiny_engine(tmp_path / "t").test(model, datamodule=datamodule)
    assert model.post_processor.is_calibrated


def test_folder_without_masks(demo_root: Path, tmp_path: Path) -> None:
    datamodule = Folder(
        name="parts",
        root=demo_root / "weave",
        normal_dir="train/good",
        abnormal_dir="test/hole",
        normal_test_dir="test/good",
        num_workers=0,
    )
    results = tiny_engine(tmp_path, max_epochs=1).train(tiny_intra(visualizer=True), datamodule=datamodule)
    assert set(results[0]) >= {"image_AUROC", "image_F1Score"}
    assert len(list((tmp_path / "InTra/parts/v0/images").rglob("*.png"))) > 5


def test_plain_loaders_without_a_datamodule(demo: TextureDemo, tmp_path: Path) -> None:
    demo.prepare_data()
    demo.setup()
    train, val = demo.train_dataloader(), demo.val_dataloader()
    model = tiny_intra()
    demo.train_data.augmentations = demo.val_data.augmentations = None
    tiny_engine(tmp_path, max_epochs=1).fit(model, train_dataloaders=train, val_dataloaders=val)
    assert model.post_processor.is_calibrated


def test_augmentations_reach_training_but_not_the_statistics(demo_root: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    class Count(Resize):
        def forward(self, *inputs: object) -> object:
            seen.append(1)
            return super().forward(*inputs)

    datamodule = TextureDemo(demo_root, num_workers=0, train_augmentations=Compose([Count((64, 64))]))
    tiny_engine(tmp_path, max_epochs=2).fit(tiny_intra(), datamodule=datamodule)
    assert len(seen) == 2 * 54  # once for each training image and epoch; held-out images and eq. 17 do without


def test_images_that_never_change_are_read_once(demo: TextureDemo, tmp_path: Path, monkeypatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(
        "anomalib.data.datasets.base.image.read_image",
        lambda path, *args, **kwargs: read.append(str(path)) or read_image(path, *args, **kwargs),
    )
    tiny_engine(tmp_path, max_epochs=3).fit(tiny_intra(), datamodule=demo)
    held_out = [path for path, times in Counter(read).items() if times == 4]  # validation of 3 epochs, thresholds
    training = [path for path, times in Counter(read).items() if times == 2]  # windows of all epochs, eq. 17
    assert (len(held_out), len(training)) == (6, 54)


@pytest.mark.parametrize("pre_processor", [PreProcessor(Normalize([0.5] * 3, [0.5] * 3))])
def test_normalizing_pre_processors_are_refused(pre_processor: PreProcessor) -> None:
    with pytest.raises(ValueError, match=r"images in \[0, 1\].*Normalize"):
        tiny_intra(pre_processor=pre_processor)


@pytest.mark.parametrize("post_processor", [False, PostProcessor()])
def test_other_post_processors_are_refused(post_processor: PostProcessor | bool) -> None:
    with pytest.raises(TypeError, match="InTraPostProcessor"):
        tiny_intra(post_processor=post_processor)


def test_normalizing_augmentations_are_refused(demo_root: Path, tmp_path: Path) -> None:
    datamodule = TextureDemo(demo_root, num_workers=0, augmentations=Normalize([0.5] * 3, [0.25] * 3))
    with pytest.raises(ValueError, match=r"in \[0, 1\].*Normalize"):
        tiny_engine(tmp_path).fit(tiny_intra(), datamodule=datamodule)


def test_images_of_another_size_than_image_size_are_refused(demo: TextureDemo, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="96 x 96 pixels after the pre-processor, but image_size is 64 x 64"):
        tiny_engine(tmp_path).fit(tiny_intra(pre_processor=PreProcessor(Resize((96, 96)))), datamodule=demo)


def test_checkpoint_of_other_sizes_is_refused_in_one_sentence(trained: tuple, tmp_path: Path) -> None:
    _, _, datamodule, run, _ = trained
    model = tiny_intra(embed_dim=16, image_size=(96, 64))
    with pytest.raises(ValueError, match=r"image_size=\(64, 64\) \(here \(96, 64\)\), embed_dim=32 \(here 16\)"):
        tiny_engine(tmp_path).test(model, datamodule=datamodule, ckpt_path=run / "weights/lightning/model.ckpt")


def test_nan_pixels_are_refused(trained: tuple) -> None:
    model, *_ = trained
    images = torch.rand(2, 3, 64, 64)
    images[1, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        model(images)


def test_too_small_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"32 x 64 .* nearest size that works is 48 x 64"):
        tiny_intra(image_size=(32, 64))


def test_exported_torch_model_gives_the_same_scores(
    trained: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, engine, datamodule, *_ = trained
    path = engine.export(model, "torch", export_root=tmp_path)
    assert all(weight.requires_grad for weight in model.model.parameters())  # it can still be trained
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    inferencer = TorchInferencer(path, device="cpu")
    tested = scores_of(engine.predict(model, datamodule=datamodule))
    for name in ("000.png", "005.png"):
        prediction = inferencer.predict(datamodule.root / "weave/test/scratch" / name)
        assert not prediction.anomaly_map.requires_grad  # though nothing switched gradients off
        assert prediction.pred_score.item() == pytest.approx(float(tested["scratch" + name]), abs=1e-6)


def test_bf16_training_calibrates_and_predicts(demo: TextureDemo, tmp_path: Path) -> None:
    model = tiny_intra()
    results = tiny_engine(tmp_path, max_epochs=1, precision="bf16-mixed").train(model, datamodule=demo)
    assert 0 <= results[0]["pixel_AUROC"] <= 1
    assert torch.isfinite(model.post_processor.training_mean).all()
