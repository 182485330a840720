# SPDX-License-Identifier: Apache-2.0
"""Each private part of Lightning and anomalib that is reached: an update that moves one fails here, and says which."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.metrics import AUROC, F1Max
from anomalib.pre_processing import PreProcessor
from anomalib.utils.path import create_versioned_dir
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2 import Resize

from anomalib_intra import TextureDemo
from anomalib_intra.training import internals
from anomalib_intra.training.random_state import random_state, set_random_state


class Line(LightningModule):
    """The least that Lightning trains."""

    def __init__(self) -> None:
        super().__init__()
        self.learning_rate = 0.1
        self.line = torch.nn.Linear(1, 1)
        self.saw: list[float] = []
        self.trials: list[bool] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)

    def training_step(self, batch: list) -> torch.Tensor:
        self.saw.append(float(batch[0].sum()))
        return self.line(batch[0]).square().mean()

    def validation_step(self, batch: list) -> None:
        self.saw.append(float(batch[0].sum()))

    test_step = validation_step

    def on_train_end(self) -> None:
        self.trials.append(internals.is_trial(self.trainer))


def numbers(value: float) -> DataLoader:
    return DataLoader(TensorDataset(torch.full((1, 1), value)))


def trainer_in(folder: Path, *callbacks: Callback) -> Trainer:
    return Trainer(
        default_root_dir=folder, max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, callbacks=list(callbacks),
    )  # fmt: skip


class Exchanges(Callback):
    """Puts other loaders in place when a training or a test begins."""

    def on_fit_start(self, trainer: Trainer, pl_module: Line) -> None:
        for source, given, other in (
            (internals.training_source(trainer), 1.0, 10.0),
            (internals.validation_source(trainer), 2.0, 20.0),
        ):
            assert float(next(iter(source.dataloader()))[0]) == given
            source.instance = numbers(other)

    def setup(self, trainer: Trainer, pl_module: Line, stage: str) -> None:
        if stage in ("test", "validate"):
            source = internals.evaluation_source(trainer, stage)
            assert float(next(iter(source.dataloader()))[0]) == 3.0
            source.instance = numbers(30.0)


def test_training_source_and_validation_source_give_loaders_and_take_others(tmp_path: Path) -> None:
    model = Line()
    trainer_in(tmp_path, Exchanges()).fit(model, numbers(1.0), numbers(2.0))
    assert model.saw == [10.0, 20.0]


def test_validation_source_tells_whether_there_is_one(tmp_path: Path) -> None:
    defined = []

    class Asks(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: Line) -> None:
            defined.append(internals.validation_source(trainer).is_defined())

    for validation in (numbers(2.0), None):
        trainer_in(tmp_path, Asks()).fit(Line(), numbers(1.0), validation)
    assert defined == [True, False]


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_evaluation_source_gives_a_loader_and_takes_another(tmp_path: Path, stage: str) -> None:
    model = Line()
    getattr(trainer_in(tmp_path, Exchanges()), stage)(model, numbers(3.0), verbose=False)
    assert model.saw == [30.0]


def test_set_run_folder_moves_what_is_written(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    internals.set_run_folder(trainer, tmp_path / "moved")
    assert Path(trainer.default_root_dir) == tmp_path / "moved"


def test_point_latest_to_moves_the_link_that_anomalib_sets_and_makes_none(tmp_path: Path) -> None:
    first, second = create_versioned_dir(tmp_path).resolve(), create_versioned_dir(tmp_path).resolve()
    latest = tmp_path / "latest"
    assert latest.resolve() == second
    assert internals.point_latest_to(first)
    assert latest.resolve() == first
    assert not internals.point_latest_to(first)
    latest.unlink()
    assert not internals.point_latest_to(second)
    assert not latest.exists()


def test_resize_as_the_model_does_lets_the_datamodule_ask_anew(few: TextureDemo, tmp_path: Path) -> None:
    trainer, model = trainer_in(tmp_path), Line()
    trainer.datamodule, few.trainer = few, trainer
    trainer.strategy.connect(model)
    few.setup("test")
    assert few.test_data.augmentations is None
    model.pre_processor = PreProcessor(Resize((8, 8)))
    internals.resize_as_the_model_does(trainer)
    assert few.test_data.augmentations.size == [8, 8]


def test_trainer_of_finds_a_trainer_or_none(tmp_path: Path) -> None:
    model, trainer = Line(), trainer_in(tmp_path)
    assert internals.trainer_of(model) is None
    model.trainer = trainer
    assert internals.trainer_of(model) is trainer


def test_parser_of_finds_the_parser_of_a_command() -> None:
    arguments = ["fit", "--model", "anomalib_intra.InTra", "--model.depth", "1", "--data", "anomalib_intra.MVTec"]
    cli = AnomalibCLI(arguments, run=False)
    dumped = internals.parser_of(cli, "fit").dump(cli.config["fit"], skip_default=True)
    assert "class_path: anomalib_intra.InTra" in dumped


def test_is_trial_tells_the_search_for_a_learning_rate_from_a_training(tmp_path: Path) -> None:
    model = Line()
    trainer_in(tmp_path, LearningRateFinder(num_training_steps=3)).fit(model, numbers(1.0), numbers(2.0))
    assert model.trials == [True, False]


def test_forget_update_lets_a_metric_warn_that_it_saw_nothing() -> None:
    metric = AUROC(fields=["pred_score", "gt_label"], strict=False)
    metric.update(SimpleNamespace(pred_score=None, gt_label=None))
    internals.forget_update(metric)
    assert not metric.update_called


def test_expect_raw_scores_ends_the_guessing_within_metrics_too() -> None:
    for metric in (F1Max(fields=["pred_score", "gt_label"]), AUROC(fields=["pred_score", "gt_label"])):
        internals.expect_raw_scores(metric)
        metric.update(SimpleNamespace(pred_score=torch.tensor([20.0, 30.0, 40.0]), gt_label=torch.tensor([0, 1, 0])))
        metric.update(SimpleNamespace(pred_score=torch.tensor([0.9]), gt_label=torch.tensor([0])))
        assert metric.compute() == pytest.approx(2 / 3)  # a sigmoid would tie 20, 30 and 40


def test_every_function_has_a_test_here() -> None:
    functions = [
        name
        for name, one in vars(internals).items()
        if inspect.isfunction(one) and one.__module__ == internals.__name__
    ]
    tests = " ".join(name for name in globals() if name.startswith("test_"))
    assert [name for name in functions if name not in tests] == []


# ---- accelerators ----------------------------------------------------------------------------------------------------


def test_the_random_state_of_an_accelerator_goes_on_and_that_of_another_kind_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator()
    module = SimpleNamespace(get_rng_state=generator.get_state, set_rng_state=generator.set_state)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    state = random_state()
    first = torch.rand(3, generator=generator)
    set_random_state(state)
    assert torch.equal(first, torch.rand(3, generator=generator))
    for accelerator in ({"mps": state["torch"]}, {}):
        before = generator.get_state()
        set_random_state({**state, "accelerator": accelerator})
        assert torch.equal(before, generator.get_state())
    del state["accelerator"]  # of an older version
    set_random_state(state)
