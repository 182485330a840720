# SPDX-License-Identifier: Apache-2.0
"""The one-pass model in use: training, resume, test, prediction, export, checkpoints."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from anomalib.data import PredictDataset
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader

from anomalib_intra import InTraPostProcessor, OnePassInTra, TextureDemo
from anomalib_intra.components.anomaly_map import difference_map
from anomalib_intra.data.images import cut_images, sample_images
from anomalib_intra.one_pass import lightning_model
from anomalib_intra.one_pass.comparison import comparison_loss
from anomalib_intra.one_pass.loss import PaintingLoss
from anomalib_intra.one_pass.torch_model import Painting
from anomalib_intra.training import checkpoints

from ..conftest import Fails, Run, tiny_engine, tiny_one_pass


def test_it_learns_and_is_tested(trained_one_pass: Run) -> None:
    model, folder, metrics = trained_one_pass
    assert metrics["image_AUROC"] > 0.8
    assert metrics["pixel_AUROC"] > 0.8
    losses = [row["val_loss"] for row in model.losses]
    assert losses[-1] < 0.6 * losses[0]
    pictures = list(folder.glob("images/**/*.png"))
    assert len(pictures) > 10


def test_difference_maps_are_logits_of_the_head_and_equation_16_of_all_radii(trained_one_pass: Run) -> None:
    model = copy.deepcopy(trained_one_pass.model).eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        compared, painting = model.compare(images), model.model(images)
    expected = torch.zeros(2, 1, 64, 64, dtype=torch.float64)
    for number in range(3):
        expected += 5 * difference_map(images, painting.painted[:, number]).double() / 3
        patches, pixels = (x[:, number : number + 1] for x in (painting.of_cells, painting.of_pixels))
        of_both = torch.nn.functional.interpolate(patches, (64, 64), mode="bilinear").double() + pixels.double()
        expected += of_both / 2 / 3
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
        model = tiny_one_pass()
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
    model = tiny_one_pass(minutes=0.02)
    engine = tiny_engine(tmp_path, max_epochs=1000, logger=False)
    engine.fit(model, datamodule=TextureDemo(demo_root, num_workers=0))
    assert model.progress == 1.0
    assert 1.2 <= model._seconds < 10
    assert engine.trainer.optimizers[0].param_groups[1]["lr"] < 0.1 * model.learning_rate
    assert model.is_calibrated

    (last,) = tmp_path.rglob("last.ckpt")
    resumed = tiny_one_pass(minutes=0.02)
    again = tiny_engine(tmp_path / "again", max_epochs=1000, logger=False)
    again.fit(resumed, datamodule=TextureDemo(demo_root, num_workers=0), ckpt_path=last)
    checkpoint = torch.load(last, weights_only=True)
    for group in checkpoint["optimizer_states"][0]["param_groups"]:
        del group["matrices"]  # AdamW has none
    with pytest.raises(ValueError, match=r"begun with another optimizer \(that of earlier versions was AdamW\): train"):
        resumed.on_load_checkpoint(checkpoint)
    assert resumed._seconds >= model._seconds  # its time is up
    assert again.trainer.global_step <= engine.trainer.global_step + 1


@pytest.mark.parametrize(("best", "every", "is_told"), [(12, 1, True), (23, 1, False), (12, 2, True)])
def test_a_training_that_was_too_long_for_its_images_is_told(
    best: int, every: int, is_told: bool, few: TextureDemo, tmp_path: Path, monkeypatch, caplog
) -> None:
    model = tiny_one_pass()
    monkeypatch.setattr(model, "validation_loss", lambda *_: torch.tensor(abs(model.current_epoch + 1.0 - best)))
    engine = tiny_engine(tmp_path, max_epochs=24, check_val_every_n_epoch=every, logger=False)
    engine.fit(model, datamodule=few)
    assert torch.load(engine.best_model_path, weights_only=True)["epoch"] == best - 1
    told = f"painted best after {best} of 24 epochs, when the learning rate was still high"
    assert (told in caplog.text) == is_told
    assert (f"with max_epochs={best}, the learning rate is down by then" in caplog.text) == is_told


def test_it_is_told_by_what_ended_it_and_not_without_a_validation(
    few: TextureDemo, tmp_path: Path, monkeypatch, caplog
) -> None:
    model = tiny_one_pass(minutes=10)
    monkeypatch.setattr(model, "validation_loss", lambda *_: torch.tensor(abs(model.current_epoch - 4.0)))
    tiny_engine(tmp_path / "epochs", max_epochs=20, logger=False).fit(model, datamodule=few)
    assert "with max_epochs=5, the learning rate is down by then" in caplog.text  # not with fewer minutes
    caplog.clear()
    never = tiny_one_pass()
    engine = tiny_engine(tmp_path / "never", max_epochs=20, check_val_every_n_epoch=30, logger=False)
    engine.fit(never, datamodule=few)
    assert never.is_calibrated
    assert "the learning rate is down by then" not in caplog.text


def test_a_run_that_was_stopped_goes_on_in_its_own_trainer_with_its_time_and_losses(
    few: TextureDemo, tmp_path: Path
) -> None:
    model, fails = tiny_one_pass(minutes=10), Fails(at=40)  # in the third epoch
    engine = tiny_engine(tmp_path, max_epochs=4, callbacks=[fails], logger=False)
    with pytest.raises(ValueError, match="no more"):
        engine.fit(model, datamodule=few)
    seconds, first = model.seconds_left, model.losses[:2]
    fails.at = -1
    engine.fit(model, datamodule=few)
    assert model.seconds_left < seconds
    assert [row["epoch"] for row in model.losses] == [0, 1, 2, 3]
    assert model.losses[:2] == first


@pytest.mark.parametrize(
    ("model", "trainer"),
    [({"minutes": 1e-6}, {"max_epochs": -1}), ({"minutes": None}, {"max_epochs": 1})],
    ids=["fewer minutes", "as many epochs"],
)
def test_a_run_that_was_cut_off_can_be_ended_at_once(
    model: dict, trainer: dict, few: TextureDemo, tmp_path: Path
) -> None:
    engine = tiny_engine(tmp_path / "first", max_epochs=1)
    engine.fit(tiny_one_pass(minutes=10), datamodule=few)
    cut_off = Path(engine.best_model_path).with_name("last.ckpt")
    assert not OnePassInTra.load_from_checkpoint(cut_off).is_calibrated
    steps = torch.load(cut_off, weights_only=False)["global_step"]
    engine = tiny_engine(tmp_path / "second", **trainer)
    engine.fit(tiny_one_pass(**model), datamodule=few, ckpt_path=cut_off)
    assert engine.trainer.global_step <= steps + 1
    assert OnePassInTra.load_from_checkpoint(engine.best_model_path).is_calibrated


def test_prediction_from_a_checkpoint_equals_that_of_the_model(
    trained_one_pass: Run, demo_root: Path, tmp_path: Path
) -> None:
    loaded = OnePassInTra.load_from_checkpoint(trained_one_pass.checkpoint)
    images = PredictDataset(demo_root / "weave/test/good")
    scores = []
    for one in (copy.deepcopy(trained_one_pass.model), loaded):
        loader = DataLoader(images, batch_size=3, collate_fn=images.collate_fn)
        batches = tiny_engine(tmp_path, logger=False).predict(one, dataloaders=loader)
        scores.append(torch.cat([batch.pred_score for batch in batches]))
    assert torch.equal(*scores)


def test_a_checkpoint_is_scored_as_it_was_calibrated_unless_asked_otherwise(
    trained_one_pass: Run, tmp_path: Path
) -> None:
    def loaded(checkpoint: Path, **options: float) -> OnePassInTra:
        return OnePassInTra.load_from_checkpoint(checkpoint, post_processor=InTraPostProcessor(**options))

    assert trained_one_pass.model.post_processor.score_share == 0.005
    assert loaded(trained_one_pass.checkpoint).post_processor.score_share == 0.005
    other = loaded(trained_one_pass.checkpoint, score_share=0.0).post_processor
    assert (other.score_share, other.is_calibrated) == (0.0, False)

    before = torch.load(trained_one_pass.checkpoint, weights_only=False)  # of a version whose score was the maximum
    del before["anomalib_post_processor_config"]["score_share"], before["calibrated_with"]["score_share"]
    torch.save(before, tmp_path / "before.ckpt")
    kept = loaded(tmp_path / "before.ckpt").post_processor
    assert (kept.score_share, kept.is_calibrated) == (0.0, True)


def test_gradients_are_finite_where_images_are_constant() -> None:
    model = tiny_one_pass()
    for value in (0.0, 0.5, 1.0):
        samples = sample_images(torch.full((2, 3, 64, 64), value), 1, torch.Generator().manual_seed(0))
        loss = model.loss_of(samples)
        loss.backward()
        assert loss.isfinite()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())


def test_a_loss_is_that_of_clean_images_painted_from_spoiled_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given, seen = tiny_one_pass(vary_light=False), [], []
    images = torch.linspace(0.2, 0.8, 4)[:, None, None, None].expand(-1, 3, 64, 64)
    samples = sample_images(images, 1, torch.Generator().manual_seed(0), augment=False)
    clean, replaced = cut_images(samples), torch.zeros(4, 1, 64, 64)
    replaced[..., 10:30, 20:40] = 1

    def blacken(*given_to_it: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        given.append(given_to_it)
        return given_to_it[0] * (1 - replaced), replaced

    def paint(spoiled: torch.Tensor, radii: tuple[int, ...]) -> Painting:
        assert torch.equal(spoiled, clean * (1 - replaced))
        seen.append((radii, painting := original(spoiled, radii)))
        return painting

    original = model.model.paint
    monkeypatch.setattr(model.model, "paint", paint)
    monkeypatch.setattr(lightning_model, "spoil", blacken)
    torch.manual_seed(0)
    with torch.no_grad():
        losses = [model.loss_of(samples) for _ in range(60)]
        (_, painting), spoiled = seen[0], clean * (1 - replaced)
        of_both = (logits[:, 0] for logits in (painting.of_cells, painting.of_pixels))
        expected = PaintingLoss()(clean, painting.painted[:, 0]) + comparison_loss(*of_both, clean, spoiled, replaced)
    torch.testing.assert_close(losses[0], expected)
    assert all(torch.equal(images_given, clean) and share == 0.85 for images_given, _, share in given)

    donors = torch.stack([donors for _, donors, _ in given])
    assert set(donors.unique().tolist()) == set(images.unique().tolist())  # of the batch, whole
    assert (donors.amax(dim=(2, 3, 4)) == donors.amin(dim=(2, 3, 4))).all()
    assert 0.6 < (donors != clean).any(dim=(2, 3, 4)).float().mean() < 0.9  # three quarters are of another image
    radii = [radii for radii, _ in seen]
    assert set(radii) == {(0,), (1,), (2,)}
    assert min(map(radii.count, set(radii))) >= 8


@pytest.mark.parametrize("augment", [False, True])
def test_images_are_flipped_only_where_asked_for(augment: bool) -> None:
    images = torch.rand(20, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    samples = tiny_one_pass(augment=augment).sampling.sample(images, 1, torch.Generator().manual_seed(0))
    assert torch.equal(cut_images(samples), images[samples.index]) != augment


@pytest.mark.parametrize(("size", "patch_size"), [((10, 10), 5), ((12, 10), 2), ((16, 16), 8)])
def test_the_loss_is_finite_at_the_smallest_sizes(size: tuple[int, int], patch_size: int) -> None:
    model = tiny_one_pass(image_size=size, patch_size=patch_size, radii=(0,))
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    samples = sample_images(images, 1, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    for _ in range(5):
        loss = model.loss_of(samples)
        loss.backward()
        assert loss.isfinite()
    assert all(weight.grad.isfinite().all() for weight in model.model.parameters())
    assert model.compare(images).difference.isfinite().all()


@pytest.mark.parametrize(
    ("size", "patch_size", "works"),
    [((8, 512), 8, (16, 512)), ((3, 512), 8, (16, 512)), ((8, 8), 8, (16, 16)), ((10, 8), 2, (10, 10))],
)
def test_sizes_whose_loss_would_not_be_finite_are_refused_and_the_nearest_that_works_is_named(
    size: tuple[int, int], patch_size: int, works: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}.*nearest size that works is {works[0]} x {works[1]}"):
        tiny_one_pass(image_size=size, patch_size=patch_size, radii=(0,))
    tiny_one_pass(image_size=works, patch_size=patch_size, radii=(0,))


def test_a_size_that_is_too_small_in_both_ways_is_refused_with_one_that_works_in_both() -> None:
    """A hole of radius 2 hides up to five patches in a row."""
    with pytest.raises(ValueError, match="nearest size that works is 16 x 48"):
        tiny_one_pass(image_size=(8, 24))
    tiny_one_pass(image_size=(16, 48))


def test_a_model_with_a_radius_that_hides_nothing_learns_and_scores(few: TextureDemo, tmp_path: Path) -> None:
    model, engine = tiny_one_pass(radii=(-1, 0, 1)), tiny_engine(tmp_path, max_steps=3, logger=False)
    seed_everything(0)
    (metrics,) = engine.train(model, datamodule=few)
    assert all(loss == loss for row in model.losses for loss in row.values())
    assert 0 < metrics["pixel_AUROC"] <= 1
    scores = torch.cat([batch.pred_score for batch in engine.predict(model, datamodule=few)])
    assert scores.isfinite().all()
    assert len(scores.unique()) > 1


def test_what_differs_when_a_training_goes_on_is_told(
    trained_one_pass: Run, demo: TextureDemo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (last,) = Path(trained_one_pass.checkpoint).parent.glob("last.ckpt")
    for changed in ({}, {"rotate": True, "images_per_step": 3}):
        caplog.clear()
        tiny_engine(tmp_path, max_epochs=6).fit(tiny_one_pass(**changed), datamodule=demo, ckpt_path=last)
        told = [message for message in caplog.messages if message.startswith("The training goes on with")]
        assert len(told) == bool(changed)
    assert "with images_per_step=3 (until now 1), rotate=True (until now False)." in told[0]


def test_other_images_are_told_when_a_training_goes_on_but_not_a_folder_that_was_moved(
    trained_one_pass: Run, demo_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (last,) = Path(trained_one_pass.checkpoint).parent.glob("last.ckpt")
    shutil.copytree(demo_root, tmp_path / "moved")
    for category in ("weave", "speckle"):
        caplog.clear()
        datamodule = TextureDemo(tmp_path / "moved", category=category, num_workers=0)
        tiny_engine(tmp_path / "r", max_epochs=6).fit(tiny_one_pass(), datamodule=datamodule, ckpt_path=last)
        told = [message for message in caplog.messages if "goes on with other images" in message]
        assert len(told) == (category == "speckle")


def test_a_test_of_a_checkpoint_sees_images_as_the_calibration_did(
    trained_one_pass: Run, demo: TextureDemo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a checkpoint is loaded into a new model, the resize of before is that of the datamodule."""
    tiny_engine(tmp_path).test(tiny_one_pass(), datamodule=demo, ckpt_path=trained_one_pass.checkpoint)
    assert "was calibrated on images that went through" not in caplog.text


def test_a_checkpoint_of_another_architecture_is_refused(
    trained_one_pass: Run, demo: TextureDemo, tmp_path: Path
) -> None:
    other = tiny_one_pass(radii=(0, 1))
    with pytest.raises(ValueError, match=r"another OnePassInTra, with radii=\(0, 1, 2\) \(here \(0, 1\)\)"):
        tiny_engine(tmp_path).test(other, datamodule=demo, ckpt_path=trained_one_pass.checkpoint)


@pytest.mark.parametrize("earlier", ["without convolutions", "with a cell as large as the patch"])
def test_a_checkpoint_of_an_earlier_head_is_refused(earlier: str, trained_one_pass: Run, tmp_path: Path) -> None:
    path = tmp_path / "earlier.ckpt"
    checkpoint = torch.load(trained_one_pass.checkpoint, weights_only=False)
    if earlier == "without convolutions":
        del checkpoint["state_dict"]["model.comparison.texture.0.weight"]
    else:
        checkpoint["state_dict"]["model.comparison.neighbours.3.bias"] = torch.zeros(1 + 16**2)
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"an earlier OnePassInTra.*train it anew"):
        OnePassInTra.load_from_checkpoint(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"minutes": 0}, "minutes must be more than 0"), ({"radii": (0, 9)}, "radii"), ({"num_heads": 3}, "num_heads")],
)
def test_what_does_not_work_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_one_pass(**options)


def test_the_post_processor_is_made_for_logits() -> None:
    assert tiny_one_pass().post_processor.deviation == "half"
    assert isinstance(tiny_one_pass().post_processor, InTraPostProcessor)
    with pytest.raises(ValueError, match="are logits: leave deviation out"):
        tiny_one_pass(post_processor=InTraPostProcessor(deviation="positive"))


def norms(optimizer: torch.optim.Optimizer) -> list[float]:
    """Norms of the gradients of painter and head."""
    groups = [[weight.grad.flatten() for weight in group["params"]] for group in optimizer.param_groups]
    return [float(torch.cat(gradients).norm()) for gradients in groups]


def test_gradients_of_painter_and_head_are_clipped_to_a_norm_of_1_each() -> None:
    model = tiny_one_pass()
    optimizer = model.configure_optimizers()["optimizer"]
    for size, expected in ((1e3, 1.0), (1e-9, None)):
        for weight in model.model.parameters():
            weight.grad = torch.full_like(weight, size)
        before = norms(optimizer)
        model.configure_gradient_clipping(optimizer)
        assert norms(optimizer) == pytest.approx([expected or norm for norm in before], rel=1e-4)


def test_a_trainer_that_clips_in_its_own_way_is_heeded(few: TextureDemo, tmp_path: Path) -> None:
    largest = []

    class Look(Callback):
        def on_before_zero_grad(self, trainer: Trainer, model: OnePassInTra, optimizer: torch.optim.Optimizer) -> None:
            if optimizer.param_groups[0]["params"][0].grad is not None:
                largest.append(max(norms(optimizer)))

    options = {"max_steps": 3, "gradient_clip_val": 1e-3, "gradient_clip_algorithm": "norm"}
    tiny_engine(tmp_path, callbacks=[Look()], logger=False, **options).fit(tiny_one_pass(), datamodule=few)
    assert largest
    assert all(0 < norm < 1.001e-3 for norm in largest)


@pytest.mark.parametrize(("option", "name"), [("rotate", "turn"), ("vary_light", "vary_light")])
def test_images_are_turned_and_lit_otherwise_where_asked_for_and_nowhere_else(
    option: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lightning_model, name, torch.zeros_like)
    monkeypatch.setattr(lightning_model, "spoil", lambda images, donors, share: (images, images[:, :1] * 0))
    samples = sample_images(torch.full((2, 3, 64, 64), 0.5), 1, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    for asked in (True, False):
        model, seen = tiny_one_pass(**{option: asked}), []
        monkeypatch.setattr(
            model.loss, "forward", lambda images, painted, seen=seen: seen.append(images.max()) or painted.sum() * 0
        )
        for _ in range(10):
            model.loss_of(samples)
        assert (0.0 in seen) == asked
        assert (0.5 in seen) == (not asked or option == "vary_light")  # some images keep their light
