# SPDX-License-Identifier: Apache-2.0
"""RIAD in use: training, resume, test, prediction, export, checkpoints."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from anomalib.data import PredictDataset
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader

from anomalib_intra import RIAD, InTraPostProcessor, TextureDemo
from anomalib_intra.data.images import sample_images
from anomalib_intra.riad import lightning_model
from anomalib_intra.riad.loss import RIADLoss
from anomalib_intra.riad.msgms import msgms_map
from anomalib_intra.training import checkpoints

from ..conftest import Run, tiny_engine, tiny_riad


def test_it_learns_and_is_tested(trained_riad: Run) -> None:
    model, folder, metrics = trained_riad
    losses = [row["val_loss"] for row in model.losses]
    assert min(losses) < 0.2 * losses[0]
    assert metrics["image_AUROC"] > 0.7
    assert metrics["pixel_AUROC"] > 0.8
    assert len(list(folder.glob("images/**/*.png"))) == 16
    assert (folder / "report.html").is_file()


def test_the_score_is_the_maximum_of_the_mean_over_cell_sizes(trained_riad: Run) -> None:
    model = copy.deepcopy(trained_riad.model).eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        compared, inpainted = model.compare(images), model.model(images).inpainted
    expected = sum(msgms_map(images, inpainted[:, k]) for k in range(2)) / 2
    torch.testing.assert_close(compared.difference, expected)
    torch.testing.assert_close(compared.reconstruction, inpainted.mean(dim=1))
    model.post_processor.enable_normalization = False
    scored = model.post_processor(compared)
    torch.testing.assert_close(scored.anomaly_map, expected)  # nothing is taken off
    torch.testing.assert_close(scored.pred_score, expected.amax(dim=(1, 2, 3)))


def test_validation_and_prediction_are_the_same_whatever_the_seed(
    trained_riad: Run, few: TextureDemo, tmp_path
) -> None:
    model = copy.deepcopy(trained_riad.model)
    results = []
    for seed in (1, 2):
        seed_everything(seed)
        engine = tiny_engine(tmp_path, logger=False)
        (validated,) = engine.validate(model, datamodule=few)
        batches = engine.predict(model, datamodule=few)
        results.append((validated["val_loss"], torch.cat([batch.pred_score for batch in batches])))
    (loss, scores), (other_loss, other_scores) = results
    assert loss == other_loss
    assert torch.equal(scores, other_scores)
    assert len(scores.unique()) > 1


def test_prediction_from_a_checkpoint_equals_that_of_the_model(
    trained_riad: Run, few_root: Path, tmp_path: Path
) -> None:
    loaded = RIAD.load_from_checkpoint(trained_riad.checkpoint)
    images = PredictDataset(few_root / "weave/test/good")
    scores = []
    for one in (copy.deepcopy(trained_riad.model), loaded):
        loader = DataLoader(images, batch_size=3, collate_fn=images.collate_fn)
        batches = tiny_engine(tmp_path, logger=False).predict(one, dataloaders=loader)
        scores.append(torch.cat([batch.pred_score for batch in batches]))
    assert torch.equal(*scores)


def test_a_run_that_was_cut_ends_as_an_uncut_one_bit_for_bit(few_root: Path, tmp_path: Path, monkeypatch) -> None:
    class CrashError(Exception):
        pass

    class CrashesWithinTheSecondEpoch(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
            if trainer.global_step == 7:
                raise CrashError

    def run(folder: str, ckpt_path: Path | None = None, callbacks: tuple[Callback, ...] = ()) -> RIAD:
        seed_everything(3)
        model = tiny_riad(visualizer=False)
        engine = tiny_engine(tmp_path / folder, callbacks=list(callbacks), logger=False)
        engine.fit(model, datamodule=TextureDemo(few_root, num_workers=0), ckpt_path=ckpt_path)
        return model

    uncut = run("uncut")
    monkeypatch.setattr(checkpoints, "_MOST_LOST", -1.0)  # saves after every step
    with pytest.raises(CrashError):
        run("cut", callbacks=(CrashesWithinTheSecondEpoch(),))
    (last,) = (tmp_path / "cut").rglob("v0/**/last.ckpt")
    resumed = run("resumed", last)
    for name, value in uncut.state_dict().items():
        assert torch.equal(value.nan_to_num(), resumed.state_dict()[name].nan_to_num()), name


def test_the_optimizer_is_plain_adam() -> None:
    optimizer = tiny_riad().configure_optimizers()["optimizer"]
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.defaults["weight_decay"] == 0


@pytest.mark.parametrize(
    "trainer",
    [{"max_epochs": 6}, {"max_steps": 12, "max_epochs": -1}, {"max_epochs": 12, "accumulate_grad_batches": 5}],
)
def test_the_learning_rate_falls_after_five_sixths_of_the_training(trainer: dict, few, tmp_path: Path) -> None:
    rates = []

    class Notes(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, module: RIAD, optimizer: torch.optim.Optimizer) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    model = tiny_riad(visualizer=False, width=1, images_per_step=9, learning_rate=1e-3)
    engine = tiny_engine(tmp_path, callbacks=[Notes()], logger=False, limit_val_batches=0, **trainer)
    engine.fit(model, datamodule=few)
    assert len(rates) == 12
    assert rates == pytest.approx([1e-3] * 10 + [1e-4] * 2)


def test_a_step_takes_the_cells_of_one_size_and_other_sets_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, drawn = tiny_riad(cell_sizes=(2, 4, 8, 16), width=1), []

    def draw(size: tuple, cell_size: int, generator: torch.Generator) -> torch.Tensor:
        sets = draw_sets(size, cell_size, generator)
        drawn.append((cell_size, sets.numpy().tobytes()))
        return sets

    draw_sets = lightning_model.draw_sets
    monkeypatch.setattr(lightning_model, "draw_sets", draw)
    samples = sample_images(torch.rand(2, 3, 64, 64), 1, torch.Generator().manual_seed(0))
    model._sample_seed = 0
    for process in range(2):
        torch.manual_seed(process)
        for step in range(16):
            model._trainer = SimpleNamespace(fit_loop=SimpleNamespace(total_batch_idx=step))
            model.loss_of(samples)
    assert drawn[:16] == drawn[16:]  # whatever the global randomness of a process
    assert {cell_size for cell_size, _ in drawn} == {2, 4, 8, 16}
    assert len({sets for _, sets in drawn}) == 16


def test_batches_of_one_step_hide_other_cells(
    few: TextureDemo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []
    batch_generator = RIAD.batch_generator
    monkeypatch.setattr(
        RIAD, "batch_generator", lambda self: seeds.append((one := batch_generator(self)).initial_seed()) or one
    )
    options = {"max_epochs": 2, "limit_train_batches": 4, "accumulate_grad_batches": 4, "limit_val_batches": 0}
    tiny_engine(tmp_path, **options, logger=False).fit(tiny_riad(width=1), datamodule=few)
    assert len(set(seeds)) == len(seeds) == 8


def test_a_loss_is_that_of_images_inpainted_in_three_goes() -> None:
    model = tiny_riad(cell_sizes=(4,)).eval()
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    samples = sample_images(images, 1, torch.Generator().manual_seed(0), augment=False)
    model._sample_seed = 5
    loss = model.loss_of(samples)
    generator = model.batch_generator()
    torch.randint(1, (), generator=generator)  # the size of the cells
    sets = lightning_model.draw_sets((64, 64), 4, generator)
    torch.testing.assert_close(loss, RIADLoss()(images, model.model.inpaint(images, sets[None])[:, 0]))


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_architecture_is_refused(trained_riad: Run, few: TextureDemo, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"another RIAD, with width=4 \(here 8\)"):
        tiny_engine(tmp_path).test(tiny_riad(width=8), datamodule=few, ckpt_path=trained_riad.checkpoint)


@pytest.mark.parametrize("options", [{"deviation": "squared"}, {"deviation": "half"}, {"colour_weight": 0.5}])
def test_options_of_another_map_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="a difference map of its own"):
        tiny_riad(post_processor=InTraPostProcessor(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"width": 0}, "width"), ({"images_per_step": 0}, "images_per_step"), ({"learning_rate": -1.0}, "learning_rate")],
)
def test_what_does_not_work_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message} must be"):
        tiny_riad(**options)
