# SPDX-License-Identifier: Apache-2.0
"""Lightning's search for a learning rate works; its search for a batch size is refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner

from anomalib_intra import InTra, PatchSVDD, TextureDemo

from ..conftest import tiny_engine, tiny_intra, tiny_one_pass, tiny_riad


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []
        self.rates: set[float] = set()

    def on_train_batch_end(self, trainer: Trainer, pl_module: InTra, outputs: dict, *_: object) -> None:
        self.seen.append(float(outputs["loss"]))
        self.rates.add(trainer.optimizers[0].param_groups[0]["lr"])


def small_svdd(**arguments: object) -> PatchSVDD:
    return PatchSVDD((128, 128), pairs_per_image=4, pair_batch_size=12, visualizer=False, **arguments)


def train(make: Callable, root: Path, demo_root: Path, *finders: Callback, **arguments: object) -> tuple:
    seed_everything(5)
    model, losses = make(**arguments), Losses()
    engine = tiny_engine(root, max_epochs=1, callbacks=[*finders, losses], logger=False)
    engine.fit(model, datamodule=TextureDemo(demo_root, num_workers=0))
    return model, losses, engine


@pytest.mark.parametrize("validated", [True, False])
def test_a_run_that_goes_on_keeps_the_rate_that_was_found(few: TextureDemo, tmp_path: Path, validated: bool) -> None:
    def finder() -> LearningRateFinder:
        return LearningRateFinder(min_lr=1e-4, max_lr=1e-2, num_training_steps=15, early_stop_threshold=None)

    options = {"logger": False, **({} if validated else {"limit_val_batches": 0})}
    first, engine = tiny_one_pass(), tiny_engine(tmp_path, max_epochs=2, callbacks=[finder()], **options)
    engine.fit(first, datamodule=few)
    last = next((Path(engine.trainer.default_root_dir) / "weights" / "lightning").glob("last.ckpt"))
    losses, other = Losses(), finder()
    engine = tiny_engine(tmp_path, max_epochs=3, callbacks=[losses, other], **options)
    model = tiny_one_pass()
    engine.fit(model, datamodule=few, ckpt_path=last)
    assert other.optimal_lr is None
    assert model.learning_rate == first.learning_rate != tiny_one_pass().learning_rate
    assert len(losses.seen) == engine.trainer.global_step / 3  # one epoch of three


@pytest.mark.parametrize(
    ("make", "has_schedule"), [(tiny_intra, False), (tiny_one_pass, True), (tiny_riad, True), (small_svdd, False)]
)
def test_a_run_with_a_rate_that_was_found_is_one_with_that_rate(
    make: Callable, has_schedule: bool, demo_root: Path, tmp_path: Path
) -> None:
    # Lightning passes over the first ten rates: of fewer, it would find none and keep what there was.
    finder = LearningRateFinder(min_lr=1e-4, max_lr=1e-2, num_training_steps=15, early_stop_threshold=None)
    found, losses, engine = train(make, tmp_path / "found", demo_root, finder)
    assert found.learning_rate == finder.optimal_lr.suggestion() != make().learning_rate
    assert has_schedule or losses.rates == {found.learning_rate}
    assert found.is_calibrated
    assert Path(engine.best_model_path).is_file()
    given, expected, _ = train(make, tmp_path / "given", demo_root, learning_rate=found.learning_rate)
    assert losses.seen == expected.seen
    assert losses.rates == expected.rates
    for name, value in given.state_dict().items():
        assert torch.equal(value.nan_to_num(), found.state_dict()[name].nan_to_num()), name


def test_the_tuner_finds_a_rate_and_the_trainer_trains_with_it(demo_root: Path, tmp_path: Path) -> None:
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", logger=False, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    model, datamodule = tiny_intra(), TextureDemo(demo_root, num_workers=0)
    found = Tuner(trainer).lr_find(model, datamodule=datamodule, num_training=5, early_stop_threshold=None)
    assert len(found.results["lr"]) == 5
    trainer.fit(model, datamodule=datamodule)
    assert model.is_calibrated


def test_a_search_for_a_batch_size_is_refused_by_name(demo_root: Path, tmp_path: Path) -> None:
    datamodule = TextureDemo(demo_root, num_workers=0)
    refused = r"BatchSizeFinder and Tuner.scale_batch_size.*window_batch_size"
    with pytest.raises(ValueError, match=refused):
        tiny_engine(tmp_path, callbacks=[BatchSizeFinder()]).fit(tiny_intra(), datamodule=datamodule)
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, num_sanity_val_steps=0)
    with pytest.raises(ValueError, match=refused):
        Tuner(trainer).scale_batch_size(tiny_intra(), datamodule=datamodule)
