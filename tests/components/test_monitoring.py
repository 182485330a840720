# SPDX-License-Identifier: Apache-2.0
"""What is watched while a model trains: metrics of the validation, callbacks of Lightning, precisions."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from anomalib.callbacks import ModelCheckpoint as EnginesModelCheckpoint
from anomalib.data import AnomalibDataModule, Folder, MVTecAD
from anomalib.metrics import AUPRO, AUROC, PRO, Evaluator, F1Score, PBn, PGn
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch.nn.utils import parameters_to_vector
from torchmetrics.functional.classification import binary_auroc

from anomalib_intra import InTra, PatchSVDD
from anomalib_intra.components.batch import UnroundedBatch
from anomalib_intra.components.trained_module import TrainedModule
from anomalib_intra.metrics import PSNR

from ..conftest import Fails, tiny_engine, tiny_intra, tiny_one_pass, tiny_riad
from .test_same_pixels import changed

KINDS = ["InTra", "PatchSVDD"]


def build(kind: str, **kwargs: object) -> TrainedModule:
    seed_everything(0)
    if kind == "PatchSVDD":
        return PatchSVDD((128, 128), pairs_per_image=2, pair_batch_size=16, visualizer=False, **kwargs)
    return tiny_intra(visualizer=False, **kwargs)


@pytest.fixture(scope="module")
def few(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 normal images to train on; 6 normal images and 6 anomalies to test on."""
    return changed(demo_root, tmp_path_factory.mktemp("few"), lambda image: image, tested=6)


@pytest.fixture
def demo(few: Path) -> MVTecAD:
    return MVTecAD(few, "weave", num_workers=0, val_split_mode="from_train", seed=0)


def small(few: Path, **kwargs: object) -> Folder:
    """The same as a Folder."""
    return Folder(
        name="parts",
        root=few / "weave",
        normal_dir="train/good",
        abnormal_dir="test/hole",
        normal_test_dir="test/good",
        mask_dir="ground_truth/hole",
        num_workers=0,
        seed=0,
        **kwargs,
    )


def auroc(level: str = "image", **kwargs: object) -> AUROC:
    fields = {"image": ["pred_score", "gt_label"], "pixel": ["anomaly_map", "gt_mask"]}[level]
    return AUROC(fields=fields, prefix=f"{level}_", **kwargs)


# ---- float32 for others ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_that_fail_on_float64_get_float32_and_ranks_are_those_of_float64(
    kind: str, demo: MVTecAD, tmp_path: Path
) -> None:
    scores, dtypes = [], set()

    class Look(PGn):
        def update(self, batch: UnroundedBatch) -> None:
            dtypes.add(batch.pred_score.dtype)
            super().update(batch)

    class Keep(Callback):
        def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: object, *_: object) -> None:
            scores.append(outputs)

    maps = ["anomaly_map", "gt_mask"]
    metrics = [Look(fnr=0.2), PGn(), PBn(), PRO(fields=maps), AUPRO(fields=maps), auroc(), auroc("pixel")]
    engine = tiny_engine(tmp_path, max_epochs=1, logger=False, callbacks=[Keep()])
    (results,) = engine.train(build(kind, evaluator=Evaluator(test_metrics=metrics)), datamodule=demo)
    assert set(results) == {"PG20", "PG5", "PB5", "PRO", "AUPRO", "image_AUROC", "pixel_AUROC"}
    assert dtypes == {torch.float32}
    assert scores[0].pred_score.dtype == torch.float64
    exact, truth = (torch.cat([getattr(b, name) for b in scores]) for name in ("pred_score", "gt_label"))
    assert results["image_AUROC"] == float(binary_auroc(exact, truth.int()))


# ---- metrics of the validation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["from_test", "synthetic"])
def test_anomalies_that_are_validated_on_are_scored_while_training(
    kind: str, mode: str, few: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values: list[float] = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: TrainedModule) -> None:
            values.append(float(trainer.callback_metrics["image_AUROC"]))
            assert not pl_module.is_calibrated  # what is for the time being gets into no checkpoint

    evaluator = Evaluator(val_metrics=[auroc(), auroc("pixel")], test_metrics=[auroc()])
    stop = EarlyStopping("image_AUROC", mode="max", patience=5)
    best = ModelCheckpoint(tmp_path / "best", monitor="image_AUROC", mode="max")
    engine = tiny_engine(tmp_path, callbacks=[Watch(), stop, best], logger=False)
    with caplog.at_level(logging.WARNING):
        engine.train(build(kind, evaluator=evaluator), datamodule=small(few, val_split_mode=mode))
    assert any("scored by comparison with" in record.message for record in caplog.records)
    assert len(values) == 2
    assert all(0 <= value <= 1 for value in values)
    assert len(set(values)) > 0
    assert torch.load(best.best_model_path, weights_only=True)["epoch"] == values.index(max(values))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["from_train", "same_as_test", "none"])
def test_metrics_that_need_anomalies_are_left_out_where_there_are_none(
    kind: str, mode: str, few: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluator = Evaluator(val_metrics=[auroc(), PSNR()] if kind == "InTra" else [auroc()], test_metrics=[auroc()])
    datamodule = MVTecAD(few, "weave", num_workers=0, val_split_mode=mode, seed=0)
    engine = tiny_engine(tmp_path, max_epochs=1, logger=False)
    with caplog.at_level(logging.WARNING):
        (results,) = engine.train(build(kind, evaluator=evaluator), datamodule=datamodule)
    said = [record.message for record in caplog.records if "cannot be had" in record.message]
    assert len(said) == 1
    assert "image_AUROC" in said[0]
    assert "val_loss can be monitored" in said[0]
    assert "image_AUROC" in results
    if mode == "same_as_test" and kind == "InTra":  # the validation of its own has all of them
        (validated,) = engine.validate(engine.model, datamodule=datamodule)
        assert set(validated) >= {"image_AUROC", "PSNR"}


@pytest.mark.parametrize("watcher", [EarlyStopping, ModelCheckpoint])
@pytest.mark.parametrize("given", [True, False])
def test_waiting_for_what_never_comes_is_refused_at_the_start(
    watcher: type[Callback], given: bool, demo: MVTecAD, tmp_path: Path
) -> None:
    model = tiny_intra(evaluator=Evaluator(val_metrics=[auroc()], test_metrics=[auroc()]) if given else True)
    engine = tiny_engine(tmp_path, callbacks=[watcher(monitor="image_AUROC", mode="max")])
    message = rf"{watcher.__name__} monitors image_AUROC, which this run does not have .*: monitor val_loss\."
    with pytest.raises(ValueError, match=message):
        engine.fit(model, datamodule=demo)
    assert model.losses == []


def test_labels_are_not_there_while_training(few: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = F1Score(fields=["pred_label", "gt_label"], prefix="image_")
    model = build("InTra", evaluator=Evaluator(val_metrics=[labels, auroc()]))
    with caplog.at_level(logging.WARNING):
        tiny_engine(tmp_path, max_epochs=1).fit(model, datamodule=small(few, val_split_mode="from_test"))
    assert any("image_F1Score of the validation cannot be had" in record.message for record in caplog.records)


# ---- no validation, and Lightning's own trainer ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"limit_val_batches": 0.0}, {"barebones": True}])
def test_without_validation_nothing_stops_early(kind: str, options: dict, demo: MVTecAD, tmp_path: Path) -> None:
    model = build(kind)
    quiet = {} if "barebones" in options else {"logger": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, **quiet, **options)
    trainer.fit(model, datamodule=demo)
    assert trainer.current_epoch == 2
    assert model.is_calibrated


def test_the_engine_keeps_and_calibrates_the_last_epoch_where_nothing_is_validated(
    demo: MVTecAD, tmp_path: Path
) -> None:
    engine = tiny_engine(tmp_path, limit_val_batches=0, logger=False)
    (results,) = engine.train(build("InTra"), datamodule=demo)
    assert "image_AUROC" in results
    assert InTra.load_from_checkpoint(engine.best_model_path).is_calibrated


@pytest.mark.parametrize(("kind", "every"), [("PatchSVDD", 2), ("PatchSVDD", 10), ("InTra", 10)])
def test_the_last_weights_are_kept_where_they_were_not_validated(
    kind: str, every: int, demo: MVTecAD, tmp_path: Path
) -> None:
    seen: list[torch.Tensor] = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: TrainedModule) -> None:
            seen.append(weights_of(pl_module))

    model = build(kind)
    engine = tiny_engine(tmp_path, max_epochs=3, check_val_every_n_epoch=every, callbacks=[Watch()], logger=False)
    engine.fit(model, datamodule=demo)
    loaded = type(model).load_from_checkpoint(engine.best_model_path)
    assert Path(engine.best_model_path).name == "model.ckpt"
    assert torch.equal(weights_of(model), seen[-1])
    assert torch.equal(weights_of(loaded), seen[-1])
    assert loaded.is_calibrated


@pytest.mark.parametrize(("most", "names"), [(-1, ["epoch=1.ckpt", "epoch=2.ckpt"]), (1, ["epoch=2.ckpt"])])
def test_the_last_weights_are_kept_under_the_name_of_their_epoch(
    most: int, names: list[str], demo: MVTecAD, tmp_path: Path
) -> None:
    own = EnginesModelCheckpoint(tmp_path / "mine", filename="{epoch}", every_n_epochs=2, save_top_k=most)
    tiny_engine(tmp_path, max_epochs=3, callbacks=[own], logger=False).fit(model := build("InTra"), datamodule=demo)
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == names
    loaded = InTra.load_from_checkpoint(tmp_path / "mine/epoch=2.ckpt")
    assert torch.equal(weights_of(loaded), weights_of(model))
    assert loaded.is_calibrated


def test_waiting_for_a_validation_loss_that_never_comes_is_refused(demo: MVTecAD, tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path, limit_val_batches=0, callbacks=[EarlyStopping("val_loss")])
    with pytest.raises(ValueError, match=r"monitors val_loss, .*nothing is validated"):
        engine.fit(build("InTra"), datamodule=demo)


@pytest.mark.parametrize(
    ("model", "options", "is_said"),
    [
        (tiny_riad, {}, True),
        (tiny_riad, {"max_time": "00:00:30:00"}, False),
        (tiny_riad, {"max_steps": 5}, False),
        (tiny_intra, {}, False),  # it stops early
        (partial(tiny_one_pass, minutes=30), {}, False),  # it has its minutes
    ],
)
def test_a_training_without_an_end_is_spoken_of(
    model: Callable, options: dict, is_said: bool, demo: MVTecAD, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = tiny_engine(tmp_path, max_epochs=-1, callbacks=[Fails(at=1)], logger=False, **options)
    with pytest.raises(ValueError, match="no more"):
        engine.fit(model(visualizer=False), datamodule=demo)
    assert ("Nothing ends this training but Ctrl-C" in caplog.text) == is_said


@pytest.mark.parametrize("kind", KINDS)
def test_lightnings_trainer_may_check_the_validation_first(kind: str, demo: MVTecAD, tmp_path: Path) -> None:
    model = build(kind, evaluator=Evaluator(val_metrics=[auroc()], test_metrics=[auroc()]))
    trainer = Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, logger=False)
    trainer.fit(model, datamodule=demo)
    assert model.is_calibrated
    assert [row["epoch"] for row in model.losses] == [0]
    assert "image_AUROC" in trainer.test(model, datamodule=demo)[0]


# ---- callbacks of Lightning ------------------------------------------------------------------------------------------


class Spoil(Callback):
    """Makes the second epoch worse than the first."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: TrainedModule) -> None:
        if trainer.current_epoch > 0:
            with torch.no_grad():
                for weights in pl_module.model.parameters():
                    weights.add_(torch.randn_like(weights))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: TrainedModule) -> None:
        self.weights.append(weights_of(pl_module))


def weights_of(model: TrainedModule) -> torch.Tensor:
    return parameters_to_vector(model.model.parameters()).detach().clone()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"save_top_k": 2}, {"save_weights_only": True}, {"filename": "{epoch}"}, {"filename": "best/model"}]
)
def test_lightnings_own_checkpoint_of_the_best_epoch_is_calibrated_and_tested(
    kind: str, options: dict, demo: MVTecAD, tmp_path: Path
) -> None:
    spoil, best = Spoil(), ModelCheckpoint(tmp_path / "mine", monitor="val_loss", **options)
    engine = tiny_engine(tmp_path, callbacks=[spoil, best], logger=False)
    model = build(kind)
    (results,) = engine.train(model, datamodule=demo)
    assert torch.equal(weights_of(model), spoil.weights[0])
    loaded = type(model).load_from_checkpoint(best.best_model_path)
    assert loaded.is_calibrated
    assert torch.equal(weights_of(loaded), spoil.weights[0])
    (again,) = tiny_engine(tmp_path / "again", logger=False).test(loaded, datamodule=demo)
    assert again == pytest.approx(results)


@pytest.mark.parametrize("kind", KINDS)
def test_averaged_weights_are_kept_calibrated_and_stored(kind: str, demo: MVTecAD, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    class Last(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: TrainedModule) -> None:
            seen.append(weights_of(pl_module))

    average = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1, annealing_epochs=1)
    engine = tiny_engine(tmp_path, max_epochs=4, callbacks=[average, Last()], logger=False)
    model = build(kind)
    engine.train(model, datamodule=demo)
    # Lightning adds the weights up when an epoch begins, so it averages what the epochs before the last ended with.
    assert all(not torch.equal(weights_of(model), weights) for weights in seen)
    expected = parameters_to_vector(
        [p for name, p in average._average_model.named_parameters() if name.startswith("model.")]
    )
    torch.testing.assert_close(weights_of(model), expected.detach(), rtol=0, atol=0)
    loaded = type(model).load_from_checkpoint(engine.trainer.checkpoint_callback.best_model_path)
    assert loaded.is_calibrated
    assert torch.equal(weights_of(loaded), weights_of(model))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_averaged_step_by_step_are_validated_and_scored(kind: str, few: Path, tmp_path: Path) -> None:
    model = build(kind, evaluator=Evaluator(val_metrics=[auroc()], test_metrics=[auroc()]))
    average = EMAWeightAveraging(decay=0.9)
    engine = tiny_engine(tmp_path, callbacks=[average], logger=False)
    engine.train(model, datamodule=small(few, val_split_mode="from_test"))
    assert model.is_calibrated
    loaded = type(model).load_from_checkpoint(engine.best_model_path)
    assert torch.equal(weights_of(loaded), weights_of(model))


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true"])
def test_precisions_that_do_not_work_are_refused_by_name(
    kind: str, precision: str, demo: MVTecAD, tmp_path: Path
) -> None:
    for does in ("fit", "test"):
        with pytest.raises(ValueError, match=f"does not work with precision={precision}.*bf16-mixed"):
            getattr(tiny_engine(tmp_path, precision=precision), does)(build(kind), datamodule=demo)


# ---- thresholds ------------------------------------------------------------------------------------------------------


def only_anomalies(few: Path) -> AnomalibDataModule:
    datamodule = small(few, val_split_mode="from_test", val_split_ratio=0.2)
    split = datamodule._create_val_split

    def anomalies_only() -> None:
        split()
        labels = list(datamodule.val_data.samples.label_index)
        datamodule.val_data = datamodule.val_data.subsample([n for n, label in enumerate(labels) if label])

    datamodule._create_val_split = anomalies_only
    return datamodule


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [True, False])
def test_where_all_validation_images_are_anomalous_held_out_normal_ones_set_the_threshold_too(
    kind: str, own: bool, few: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    datamodule = only_anomalies(few)
    if own:  # in a folder of their own
        datamodule.setup()
        datamodule.val_split_mode = "from_dir"
        datamodule._is_setup = True
    seen: dict[str, int] = {}

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: TrainedModule) -> None:
            labels = torch.cat([batch.gt_label for batch in pl_module._images.thresholds]).int().tolist()
            seen.update(normal=labels.count(0), anomalous=labels.count(1))
            assert sum(int(batch.gt_label.sum()) for batch in pl_module._images.held_out) == 0

    model = build(kind)
    tiny_engine(tmp_path, max_epochs=1, callbacks=[Look()], logger=False).fit(model, datamodule=datamodule)
    assert seen["normal"] == 1
    assert seen["anomalous"] > 0
    # A validation of these images alone leaves the threshold alone.
    before = model.post_processor.image_threshold.item()
    with caplog.at_level(logging.WARNING):
        tiny_engine(tmp_path, logger=False).validate(model, datamodule=datamodule)
    assert model.post_processor.image_threshold.item() == before
    assert any("image threshold stays as it was" in record.message for record in caplog.records)


# ---- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("export", ["to_torch", "to_onnx", "to_openvino"])
def test_what_cannot_score_is_not_exported(kind: str, export: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"cannot score images yet, so it is not exported.*go on with its training"):
        getattr(build(kind), export)(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
