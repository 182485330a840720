# SPDX-License-Identifier: Apache-2.0
"""No run writes into the files of another, and none takes up what another left in a model."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from anomalib.engine import Engine
from lightning.pytorch import Callback, Trainer, seed_everything

from anomalib_intra import InTra, PatchSVDD, TextureDemo
from anomalib_intra.report import RunReport

from ..conftest import Fails, tiny_engine, tiny_intra

RUN = "TextureDemo/weave/v0"
REFUSED = r"has trained InTra already, and would write into the files of that run: make a new Engine"


def data_of(demo_root: Path, category: str = "weave") -> TextureDemo:
    return TextureDemo(demo_root, category, num_workers=0)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def small_svdd() -> PatchSVDD:
    return PatchSVDD((128, 128), pairs_per_image=1, visualizer=False)


def scoring_svdd() -> PatchSVDD:
    model = PatchSVDD((128, 128))
    model.model.bank_small = model.model.bank_big = torch.zeros(1, 64)
    return model


def demo_image(datamodule: TextureDemo) -> Path:
    return datamodule.root / "weave/test/good/000.png"


@pytest.fixture
def trained(demo_root: Path, tmp_path: Path) -> tuple[Engine, InTra, TextureDemo]:
    engine, model, datamodule = tiny_engine(tmp_path, max_epochs=1, logger=False), tiny_intra(), data_of(demo_root)
    engine.train(model, datamodule=datamodule)
    return engine, model, datamodule


# ---- a trainer that has trained --------------------------------------------------------------------------------------

SECOND: dict[str, Callable] = {
    "another model": lambda engine, model, datamodule, _: engine.train(tiny_intra(), datamodule=datamodule),
    "another model, fit": lambda engine, model, datamodule, _: engine.fit(tiny_intra(), datamodule=datamodule),
    "the same model": lambda engine, model, datamodule, _: engine.train(model, datamodule=datamodule),
    "another product": lambda engine, model, _, other: engine.train(model, datamodule=other),
    "another kind of model": lambda engine, model, datamodule, _: engine.fit(small_svdd(), datamodule=datamodule),
}


@pytest.mark.parametrize("second", SECOND)
def test_a_second_training_leaves_the_files_of_the_first_alone(
    trained: tuple, demo_root: Path, tmp_path: Path, second: str
) -> None:
    engine, model, datamodule = trained
    before, weights = contents(tmp_path), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=REFUSED) as refused:
        SECOND[second](engine, model, datamodule, data_of(demo_root, "speckle"))
    assert ("to train the same model for longer" in str(refused.value)) == (second == "the same model")
    assert contents(tmp_path) == before
    assert all(torch.equal(value.nan_to_num(), model.state_dict()[k].nan_to_num()) for k, value in weights.items())


def test_a_checkpoint_of_another_run_is_not_gone_on_from_in_this_ones_folder(
    trained: tuple, demo_root: Path, tmp_path: Path
) -> None:
    engine, _, datamodule = trained
    other = tiny_engine(tmp_path / "other", max_epochs=1, logger=False)
    other.fit(tiny_intra(), datamodule=data_of(demo_root))
    before = contents(tmp_path)
    last = tmp_path / "other/InTra" / RUN / "weights/lightning/last.ckpt"
    with pytest.raises(RuntimeError, match=REFUSED):
        engine.fit(tiny_intra(), datamodule=datamodule, ckpt_path=last)
    assert contents(tmp_path) == before


def test_a_run_goes_on_in_its_own_trainer(trained: tuple, tmp_path: Path) -> None:
    engine, model, datamodule = trained
    steps = engine.trainer.global_step
    engine.trainer.fit_loop.max_epochs = 2
    last = tmp_path / "InTra" / RUN / "weights/lightning/last.ckpt"
    engine.fit(model, datamodule=datamodule, ckpt_path=last)
    assert [row["epoch"] for row in model.losses] == [0, 1]
    # (the step, since Lightning counts the epoch on before the end of training, when a slow disk may have put saving)
    assert torch.load(last, weights_only=True)["global_step"] == engine.trainer.global_step > steps


def test_a_run_that_failed_goes_on_in_its_own_trainer_but_not_with_another_model(
    demo_root: Path, tmp_path: Path
) -> None:
    fails = Fails(at=3)
    engine, model, datamodule = tiny_engine(tmp_path, callbacks=[fails]), tiny_intra(), data_of(demo_root)
    with pytest.raises(ValueError, match="no more"):
        engine.fit(model, datamodule=datamodule)
    with pytest.raises(RuntimeError, match=REFUSED):
        engine.fit(tiny_intra(), datamodule=datamodule)
    fails.at = -1
    engine.fit(model, datamodule=datamodule)
    assert model.post_processor.is_calibrated


def test_a_training_that_failed_before_its_first_step_can_be_tried_again(demo_root: Path, tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match="after the pre-processor"):
        engine.fit(tiny_intra(pre_processor=False), datamodule=data_of(demo_root))
    engine.fit(tiny_intra(), datamodule=data_of(demo_root))
    assert (tmp_path / "InTra" / RUN / "weights/lightning/model.ckpt").is_file()


def test_models_of_anomalib_are_told_the_same(trained: tuple, tmp_path: Path) -> None:
    from anomalib.models import Padim

    engine, _, datamodule = trained
    before = contents(tmp_path)
    with pytest.raises(RuntimeError, match=REFUSED):
        engine.fit(Padim(pre_trained=False, layers=["layer1"], n_features=8, visualizer=False), datamodule=datamodule)
    assert contents(tmp_path) == before


# ---- a trainer that stands in another run's folder -------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_intra, small_svdd])
def test_a_trainer_that_has_tested_does_not_train_into_the_latest_run(
    demo_root: Path, tmp_path: Path, make: Callable
) -> None:
    first, datamodule = make(), data_of(demo_root)
    quick = {"max_epochs": 1, "limit_train_batches": 1, "logger": False}
    tiny_engine(tmp_path, **quick).fit(first, datamodule=datamodule)
    engine = tiny_engine(tmp_path, **quick)
    engine.test(first, datamodule=datamodule)
    before = contents(tmp_path)
    with pytest.raises(RuntimeError, match=r"checkpoints of another run in .*v0.*make a new Engine"):
        engine.fit(make(), datamodule=datamodule)
    assert contents(tmp_path) == before


# ---- another model in a trainer that has trained ---------------------------------------------------------------------


def test_a_test_of_another_model_leaves_pictures_and_report_of_the_run_alone(
    trained: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine, _, datamodule = trained
    before, run = contents(tmp_path), tmp_path / "InTra" / RUN
    engine.test(tiny_intra(visualizer=True), datamodule=datamodule)
    engine.predict(scoring_svdd(), data_path=demo_image(datamodule))
    assert {path: content for path, content in contents(tmp_path).items() if path in before} == before
    others = run / "other_models"
    assert len(list((others / "InTra_0/images").rglob("*.png"))) == 52
    assert (others / "InTra_0/report.html").is_file()
    assert len(list((run / "predictions").rglob("images/**/*.png"))) == 1
    assert "those of the run stay" in caplog.text
    assert Path(engine.trainer.default_root_dir) == run


def test_the_runs_own_model_is_tested_in_its_folder_however_it_is_loaded(
    trained: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine, model, datamodule = trained
    best = engine.best_model_path
    engine.test(model, datamodule=datamodule)
    engine.test(InTra.load_from_checkpoint(best), datamodule=datamodule)
    engine.test(tiny_intra(), datamodule=datamodule, ckpt_path=best)
    assert not (tmp_path / "InTra" / RUN / "other_models").exists()
    assert "not the model" not in caplog.text


def test_a_model_that_was_loaded_and_trained_on_is_tested_in_the_folder_of_that_training(
    trained: tuple, tmp_path: Path
) -> None:
    engine, _, datamodule = trained
    model = InTra.load_from_checkpoint(shutil.copy(engine.best_model_path, tmp_path / "may.ckpt"))
    tiny_engine(tmp_path, logger=False).fit(model, datamodule=datamodule)
    tested = tiny_engine(tmp_path, logger=False)
    tested.test(model, datamodule=datamodule)
    assert Path(tested.trainer.default_root_dir).resolve().name == "v1"


@pytest.mark.parametrize("by_path", [True, False])
def test_a_checkpoint_from_elsewhere_is_not_tested_into_the_latest_run(
    trained: tuple, tmp_path: Path, by_path: bool
) -> None:
    """There anomalib tests: the report of the latest training would be that of another model."""
    engine, _, datamodule = trained
    elsewhere = tmp_path / "may.ckpt"
    shutil.copy(engine.best_model_path, elsewhere)
    before, run = contents(tmp_path), tmp_path / "InTra" / RUN

    def tested(checkpoint: str | Path) -> None:
        engine = tiny_engine(tmp_path, logger=False, callbacks=[RunReport()])
        if by_path:
            engine.test(tiny_intra(), datamodule=datamodule, ckpt_path=checkpoint)
        else:
            engine.test(InTra.load_from_checkpoint(checkpoint), datamodule=datamodule)

    tested(elsewhere)
    assert {path: content for path, content in contents(tmp_path).items() if path in before} == before
    assert not (run / "report.html").exists()
    assert (run / "other_models/InTra_0/report.html").is_file()
    tested(engine.best_model_path)
    assert (run / "report.html").is_file()


def test_models_of_several_kinds_are_tested_by_one_engine_as_each_by_its_own(trained: tuple, tmp_path: Path) -> None:
    from anomalib.models import Padim

    engine, intra, datamodule = trained
    padim = Padim(pre_trained=False, layers=["layer1"], n_features=8, visualizer=False)
    quick = {"max_epochs": 1, "logger": False}
    tiny_engine(tmp_path / "padim", **quick).fit(padim, datamodule=datamodule)
    svdd = scoring_svdd()
    for model in (svdd, padim, intra, padim, svdd):
        expected = tiny_engine(tmp_path / "own", **quick).test(model, datamodule=datamodule)
        assert engine.test(model, datamodule=datamodule) == expected, model.name


# ---- a model that was trained before ---------------------------------------------------------------------------------


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: InTra, outputs: dict, *_: object) -> None:
        self.seen.append(float(outputs["loss"]))


def fine_tune(model: InTra, seed: int, root: Path, demo_root: Path) -> list[float]:
    seed_everything(seed)
    losses = Losses()
    engine = tiny_engine(root, max_epochs=1, limit_train_batches=3, callbacks=[losses], logger=False)
    engine.fit(model, datamodule=data_of(demo_root))
    return losses.seen


def test_a_loaded_model_is_fine_tuned_with_the_seed_of_now(trained: tuple, demo_root: Path, tmp_path: Path) -> None:
    path = trained[0].best_model_path
    first, again, other = (
        fine_tune(InTra.load_from_checkpoint(path), seed, tmp_path / "tuned", demo_root) for seed in (1, 1, 2)
    )
    assert first == again
    assert first[0] != other[0]


def test_a_model_in_memory_is_trained_again_with_the_seed_of_now(
    trained: tuple, demo_root: Path, tmp_path: Path
) -> None:
    model = trained[1]
    weights = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("model.")}
    first = fine_tune(model, 1, tmp_path / "tuned", demo_root)
    assert [row["epoch"] for row in model.losses] == [0]
    model.load_state_dict(weights, strict=False)
    assert first[0] != fine_tune(model, 2, tmp_path / "tuned", demo_root)[0]


def test_a_training_that_is_refused_leaves_latest_to_the_one_before(
    demo_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quick = {"max_epochs": 1, "limit_train_batches": 1, "logger": False}
    tiny_engine(tmp_path, **quick).fit(tiny_intra(), datamodule=data_of(demo_root))
    latest = tmp_path / "InTra" / Path(RUN).parent / "latest"
    first = latest.resolve()
    with pytest.raises(ValueError, match="after the pre-processor"):
        tiny_engine(tmp_path, **quick).fit(tiny_intra(pre_processor=False), datamodule=data_of(demo_root))
    assert latest.resolve() == first
    assert "Nothing was trained" in caplog.text
    assert (latest / "weights/lightning/model.ckpt").is_file()
    tiny_engine(tmp_path, **quick).fit(tiny_intra(), datamodule=data_of(demo_root))
    assert latest.resolve() != first
