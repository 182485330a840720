# SPDX-License-Identifier: Apache-2.0
"""PatchSVDD as users run it: trained, tested, saved, loaded, predicted with and exported."""

import logging
from pathlib import Path

import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.deploy import ExportType, TorchInferencer
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from einops import rearrange
from lightning.pytorch import Trainer
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_intra import PatchSVDD, TextureDemo
from anomalib_intra.patch_svdd.torch_model import FEATURE_DIM

from ..conftest import Run, tiny_engine, tiny_patch_svdd

PATCHES = 25 * 25, 5 * 5  # of 32 pixels at stride 4 and of 64 pixels at stride 16 in 128 x 128 pixels


@pytest.fixture
def trained(trained_patch_svdd: Run) -> Run:
    return trained_patch_svdd


def images_of(few: TextureDemo) -> torch.Tensor:
    batch = next(iter(few.test_dataloader()))
    return torch.as_tensor(batch.image[:3])


def test_training_fills_the_banks_with_the_training_images_alone(trained: Run, few: TextureDemo) -> None:
    model, _, metrics = trained
    few.setup()
    count = len(few.train_data)
    assert model.model.bank_small.shape == (count * PATCHES[0], FEATURE_DIM)
    assert model.model.bank_big.shape == (count * PATCHES[1], FEATURE_DIM)
    # A training image is its own nearest neighbour; a held-out one is not.
    train, held_out = ((torch.as_tensor(data[0].image)[None]) for data in (few.train_data, few.val_data))
    with torch.no_grad():
        # (up to rounding, since the bank was filled with batches of another size)
        assert model.model(train).pred_score.item() < 1e-6 * model.model(held_out).pred_score.item()
    assert {"image_AUROC", "pixel_AUROC"} <= set(metrics)


def test_mean_image_is_that_of_the_training_images(trained: Run, few: TextureDemo) -> None:
    model = trained.model
    few.setup()
    images = torch.stack([torch.as_tensor(item.image) for item in few.train_data]).double()
    torch.testing.assert_close(model.model.mean_image.double(), images.mean(dim=0), rtol=0, atol=1e-6)


def test_banks_hold_the_features_of_the_weights_that_are_tested(trained: Run, few: TextureDemo) -> None:
    model = trained.model
    few.setup()
    with torch.no_grad():
        features = model.model.encode(torch.as_tensor(few.train_data[3].image)[None])
    small = rearrange(features.small, "1 d h w -> (h w) d")
    torch.testing.assert_close(model.model.bank_small[3 * PATCHES[0] : 4 * PATCHES[0]], small, rtol=0, atol=1e-5)


def test_banks_leave_batches_without_normal_images_out() -> None:
    model = tiny_patch_svdd().eval()
    model.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    normal, anomalous = torch.rand(2, 1, 3, 128, 128)
    with torch.no_grad():
        model.learn_normal([ImageBatch(image=normal), ImageBatch(image=anomalous, gt_label=torch.tensor([1]))])
        assert torch.equal(model.model.bank_small, rearrange(model.model.encode(normal).small, "1 d h w -> (h w) d"))
        model.learn_normal([])  # a process without images
    assert model.model.bank_small.shape == model.model.bank_big.shape == (0, FEATURE_DIM)


def test_losses_are_logged_and_all_weights_train(few: TextureDemo, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_patch_svdd(pairs_per_image=1, svdd_weight=0.5)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    engine = tiny_engine(tmp_path, max_epochs=1)
    engine.fit(model, datamodule=few)
    logged = engine.trainer.callback_metrics
    assert logged["train_loss_epoch"].item() == pytest.approx(
        (logged["train_position_loss"] + 0.5 * logged["train_svdd_loss"]).item(), rel=1e-5
    )
    assert {name.split(".")[0] for name in before} == {"model", "loss"}
    assert not any(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_validation_loss_is_that_of_the_same_pairs_every_time(few: TextureDemo, tmp_path: Path) -> None:
    losses = []

    class Watch(PatchSVDD):
        def on_train_epoch_end(self) -> None:
            super().on_train_epoch_end()
            losses.append(self.trainer.callback_metrics["val_loss"].item())

    model = Watch(image_size=(128, 128), pairs_per_image=1, learning_rate=0.0)
    tiny_engine(tmp_path, max_epochs=2).fit(model, datamodule=few)
    assert losses[0] == losses[1]


def test_checkpoint_holds_banks_mean_image_and_thresholds(trained: Run, few: TextureDemo) -> None:
    model = trained.model
    loaded = PatchSVDD.load_from_checkpoint(trained.checkpoint)
    assert torch.equal(loaded.model.bank_small, model.model.bank_small)
    assert torch.equal(loaded.model.mean_image, model.model.mean_image)
    few.setup()
    images = images_of(few)
    with torch.no_grad():
        ours, theirs = model.eval()(images), loaded.eval()(images)
    assert torch.equal(ours.pred_score, theirs.pred_score)
    assert torch.equal(ours.pred_mask, theirs.pred_mask)
    assert not torch.isnan(loaded.post_processor.image_threshold)


def test_engine_tests_and_predicts_from_the_checkpoint(trained: Run, few: TextureDemo, tmp_path: Path, caplog) -> None:
    model, _, metrics = trained
    caplog.clear()
    again = tiny_engine(tmp_path / "t").test(tiny_patch_svdd(), datamodule=few, ckpt_path=trained.checkpoint)
    assert again[0] == metrics
    assert "no memory bank" not in caplog.text
    path = few.root / "weave/test/hole/000.png"
    (batch,) = tiny_engine(tmp_path / "p").predict(tiny_patch_svdd(), data_path=path, ckpt_path=trained.checkpoint)
    assert batch.anomaly_map.shape[-2:] == (128, 128)
    with torch.no_grad():
        expected = model.eval()(torch.as_tensor(batch.image))
    torch.testing.assert_close(batch.pred_score.float(), expected.pred_score, rtol=0, atol=1e-6)
    assert list((tmp_path / "p").rglob("000.png"))


def test_scores_do_not_depend_on_the_batch(trained: Run, few: TextureDemo) -> None:
    model = trained.model
    few.setup()
    images = images_of(few)
    with torch.no_grad():
        together = model.model(images).pred_score
        alone = torch.cat([model.model(image[None]).pred_score for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_export_scores_like_the_model(trained: Run, few: TextureDemo, tmp_path: Path, monkeypatch) -> None:
    model = trained.model
    path = tiny_engine(tmp_path).export(model, ExportType.TORCH, export_root=tmp_path, ckpt_path=trained.checkpoint)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    inferencer = TorchInferencer(path=path, device="cpu")
    image = few.root / "weave/test/hole/000.png"
    with torch.no_grad():
        exported = inferencer.predict(str(image))
    (batch,) = tiny_engine(tmp_path / "p").predict(tiny_patch_svdd(), data_path=image, ckpt_path=trained.checkpoint)
    torch.testing.assert_close(exported.pred_score.flatten(), batch.pred_score.float().flatten(), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        torch.as_tensor(exported.anomaly_map).squeeze(),
        torch.as_tensor(batch.anomaly_map).float().squeeze(),
        rtol=0,
        atol=1e-5,
    )


def test_checkpoint_of_a_run_that_was_cut_off(few: TextureDemo, tmp_path: Path, caplog) -> None:
    """Weights saved at the end of an epoch have no memory bank yet."""

    class CutOff(PatchSVDD):
        def on_train_end(self) -> None:
            raise KeyboardInterrupt

    model = CutOff(image_size=(128, 128), pairs_per_image=1)
    engine = tiny_engine(tmp_path, max_epochs=1)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        engine.fit(model, datamodule=few)
    (path,) = tmp_path.rglob("model.ckpt")
    model = PatchSVDD.load_from_checkpoint(path)
    with pytest.raises(RuntimeError, match=r"no memory bank.* go on with its training"):
        model(torch.rand(1, 3, 128, 128))
    with caplog.at_level(logging.WARNING):
        tiny_engine(tmp_path / "t").test(model, datamodule=few)
    assert "no memory bank" in caplog.text
    assert model.is_calibrated


def test_a_run_that_goes_on_from_a_finished_one_forgets_its_bank(
    trained: Run, few: TextureDemo, tmp_path: Path
) -> None:
    """Features of other weights would give scores that look right."""

    class CutOff(PatchSVDD):
        def on_train_end(self) -> None:
            raise KeyboardInterrupt

    model = CutOff(image_size=(128, 128), pairs_per_image=1)
    model.load_state_dict(trained.model.state_dict())
    assert model.is_calibrated
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        tiny_engine(tmp_path, max_epochs=1).fit(model, datamodule=few)
    assert not model.is_calibrated
    (path,) = tmp_path.rglob("model.ckpt")
    assert not PatchSVDD.load_from_checkpoint(path).is_calibrated


def test_wrong_components_are_refused() -> None:
    with pytest.raises(ValueError, match="take Normalize out"):
        tiny_patch_svdd(pre_processor=PreProcessor(Compose([Resize((128, 128)), Normalize([0.5], [0.5])])))
    with pytest.raises(TypeError, match="UnsaturatedPostProcessor"):
        tiny_patch_svdd(post_processor=PostProcessor())
    with pytest.raises(ValueError, match="at least 128"):
        PatchSVDD(image_size=(64, 256))


def test_images_of_another_size_are_refused(trained: Run) -> None:
    model = trained.model
    with pytest.raises(ValueError, match="resize the images"):
        model.test_step(ImageBatch(image=torch.rand(1, 3, 64, 128)))
