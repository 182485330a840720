# SPDX-License-Identifier: Apache-2.0
"""Runs that are cut off lose nothing, and what is saved is whole."""

import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint as LightningCheckpoint
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch import nn

from anomalib_intra import InTra, TextureDemo
from anomalib_intra.components.reconstruction_post_processor import InTraPostProcessor
from anomalib_intra.training import checkpoints as checkpoints_module
from anomalib_intra.training.callbacks import FiniteLoss, best_epoch
from anomalib_intra.training.checkpoints import (
    AtomicCheckpointIO,
    BestCheckpoint,
    LastCheckpoint,
    keep_last_and_best,
    keeper_of_the_best,
)
from anomalib_intra.training.random_state import random_state, set_random_state

from ..conftest import tiny_cutpaste, tiny_engine, tiny_intra, tiny_one_pass, tiny_riad

RUN = "InTra/TextureDemo/weave"
LAST = "weights/lightning/last.ckpt"
BEST = "weights/lightning/model.ckpt"
EPOCHS = 3
STEPS = 14  # of an epoch: 54 images x 8 windows / 32, rounded up


class Log(Callback):
    """Writes down what a run does; cuts it off at a step where told to."""

    def __init__(self, cut_at: int = -1, signal_to_send: int = signal.SIGKILL) -> None:
        self.cut_at, self.signal = cut_at, signal_to_send
        self.losses: list[float] = []
        self.val_losses: list[float] = []
        self.waited: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: InTra, outputs: dict, *_: object) -> None:
        self.losses.append(float(outputs["loss"]))
        if trainer.global_step == self.cut_at:
            os.kill(os.getpid(), self.signal)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: InTra) -> None:
        self.val_losses.append(float(trainer.callback_metrics["val_loss"]))
        self.waited.append(trainer.early_stopping_callback.wait_count)


def fit(root: Path, demo_root: Path, ckpt_path: Path | None = None, log: Log | None = None, **trainer: object) -> InTra:
    seed_everything(5)
    model = tiny_intra()
    engine = tiny_engine(root, callbacks=[log or Log()], **{"max_epochs": EPOCHS, **trainer})
    engine.fit(model, datamodule=TextureDemo(demo_root, num_workers=0), ckpt_path=ckpt_path)
    return model


def assert_same(one: InTra, other: InTra) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value.nan_to_num(), other.state_dict()[name].nan_to_num()), name


@pytest.fixture(scope="module")
def uncut(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[InTra, Log, Path]:
    root, log = tmp_path_factory.mktemp("uncut"), Log()
    return fit(root, demo_root, log=log), log, root / RUN / "v0"


# ---- going on --------------------------------------------------------------------------------------------------------


def test_a_run_cut_at_an_epochs_end_ends_with_the_weights_of_one_that_was_not(
    uncut: tuple, demo_root: Path, tmp_path: Path
) -> None:
    fit(tmp_path, demo_root, max_epochs=1)
    log = Log()
    resumed = fit(tmp_path, demo_root, tmp_path / RUN / "v0" / LAST, log)
    assert_same(resumed, uncut[0])
    assert log.losses == uncut[1].losses[STEPS:]
    assert log.val_losses == uncut[1].val_losses[1:]
    assert log.waited == uncut[1].waited[1:]


@pytest.mark.parametrize("step", [5, STEPS + 9], ids=["first epoch", "second epoch"])
def test_a_run_cut_within_an_epoch_goes_on_at_the_step_that_was_saved(
    uncut: tuple, demo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    class CrashError(Exception):
        pass

    class SavesEachStep(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
            if trainer.global_step == step:
                raise CrashError

    monkeypatch.setattr(checkpoints_module, "_MOST_LOST", -1.0)
    seed_everything(5)
    engine = tiny_engine(tmp_path, max_epochs=EPOCHS, callbacks=[SavesEachStep()])
    with pytest.raises(CrashError):
        engine.fit(tiny_intra(), datamodule=TextureDemo(demo_root, num_workers=0))
    log = Log()
    resumed = fit(tmp_path, demo_root, tmp_path / RUN / "v0" / LAST, log)
    assert log.losses == uncut[1].losses[step:]
    assert log.val_losses == uncut[1].val_losses[step // STEPS :]
    assert_same(resumed, uncut[0])


class Rates(Callback):
    """The learning rates of the first step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self.seen = self.seen or [group["lr"] for group in trainer.optimizers[0].param_groups]


@pytest.mark.parametrize("make", [tiny_intra, tiny_one_pass, tiny_riad])
def test_a_run_goes_on_with_the_learning_rate_that_is_asked_for(
    make: Callable, few: TextureDemo, tmp_path: Path
) -> None:
    """As the error of a training that diverged advises."""
    engine = tiny_engine(tmp_path, max_epochs=1, logger=False)
    engine.fit(make(learning_rate=1e-3, visualizer=False), datamodule=few)
    last = Path(engine.best_model_path).with_name("last.ckpt")
    of_first_step = []
    for rate in (1e-3, 1e-4):
        rates = Rates()
        again = tiny_engine(tmp_path / f"{rate}", max_epochs=3, logger=False, callbacks=[rates])
        again.fit(make(learning_rate=rate, visualizer=False), datamodule=few, ckpt_path=last)
        of_first_step.append(rates.seen)
    assert of_first_step[1] == pytest.approx([rate / 10 for rate in of_first_step[0]])


def test_with_another_loss_the_best_epoch_is_sought_anew(few: TextureDemo, tmp_path: Path, caplog) -> None:
    engine = tiny_engine(tmp_path, max_epochs=2, logger=False)
    engine.fit(tiny_one_pass(), datamodule=few)
    last = Path(engine.best_model_path).with_name("last.ckpt")
    epochs = []
    for alpha in (0.01, 10.0):
        again = tiny_engine(tmp_path, max_epochs=4, logger=False)
        model = tiny_one_pass(alpha=alpha, learning_rate=0.0)
        again.fit(model, datamodule=few, ckpt_path=last)
        epochs.append(int(torch.load(again.best_model_path, weights_only=True)["epoch"]))
        assert ("the best epoch is sought anew" in caplog.text) == (alpha == 10)
    assert epochs[0] < 2 <= epochs[1] == best_epoch(model.losses)


def test_early_stopping_waits_as_long_as_it_is_told_when_a_run_goes_on(few: TextureDemo, tmp_path: Path) -> None:
    def run(patience: int, last: Path | None = None) -> tuple[int, Path]:
        engine = tiny_engine(tmp_path, max_epochs=6, logger=False)
        model = tiny_intra(patience=patience, learning_rate=0.5, windows_per_image=1)
        engine.fit(model, datamodule=few, ckpt_path=last)
        return model.current_epoch, Path(engine.best_model_path).with_name("last.ckpt")

    stopped_after, last = run(1)
    assert stopped_after < 6
    assert run(50, last)[0] == 6


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tiny_intra, {"post_processor": {"score_share": 0.05, "colour_weight": 0.5, "deviation": "raw"}}),
        (tiny_intra, {"second_pass": True}),
        (tiny_one_pass, {"post_processor": {"score_share": 0.05, "image_quantile": 0.5}}),
    ],
)
def test_the_best_epoch_of_before_is_scored_as_the_run_that_goes_on_was_told(
    make: Callable, options: dict, few: TextureDemo, tmp_path: Path
) -> None:
    """Its thresholds are for scores of that kind: read back without options, it must give such scores."""
    options = {name: InTraPostProcessor(**o) if isinstance(o, dict) else o for name, o in options.items()}
    engine = tiny_engine(tmp_path, max_epochs=1, logger=False)
    engine.fit(make(visualizer=False), datamodule=few)
    last = Path(engine.best_model_path).with_name("last.ckpt")
    again = tiny_engine(tmp_path, max_epochs=2, logger=False)
    resumed = make(visualizer=False, learning_rate=3.0, **options)
    again.fit(resumed, datamodule=few, ckpt_path=last)
    checkpoint = torch.load(again.best_model_path, weights_only=True)
    assert checkpoint["epoch"] == 0, "painted better in spite of its learning rate: the test tests nothing"
    read_back = type(resumed).load_from_checkpoint(again.best_model_path)
    assert read_back.is_calibrated
    images = torch.stack([sample.image for sample in few.test_data])
    for value, expected in zip(read_back.eval()(images), resumed.eval()(images), strict=True):
        assert torch.equal(value, expected)
    assert resumed.learning_rate == 3.0 != read_back.learning_rate, "the rate of that epoch's optimizer is another"


_KILLED = """
import sys
from pathlib import Path
from tests.training.test_resume import Log, fit
fit(Path(sys.argv[1]), Path(sys.argv[2]), log=Log(cut_at={step}, signal_to_send={signal}))
"""


def cut_off(root: Path, demo_root: Path, step: int, sent: signal.Signals) -> subprocess.CompletedProcess:
    script = _KILLED.format(step=step, signal=int(sent))
    done = subprocess.run(
        [sys.executable, "-c", script, str(root), str(demo_root)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode != 0, done.stdout
    return done


def test_a_killed_run_goes_on_from_the_last_epochs_end(uncut: tuple, demo_root: Path, tmp_path: Path) -> None:
    done = cut_off(tmp_path, demo_root, 2 * STEPS + 3, signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL
    log = Log()
    resumed = fit(tmp_path, demo_root, tmp_path / RUN / "v0" / LAST, log)
    assert len(log.losses) <= 2 * STEPS
    assert_same(resumed, uncut[0])


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "terminated"])
def test_a_signal_ends_the_step_and_saves_it(
    uncut: tuple, demo_root: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    done = cut_off(tmp_path, demo_root, STEPS + 6, sent)
    assert "Stopping after this step" in done.stdout + done.stderr
    assert f"Go on with --ckpt_path {tmp_path / RUN / 'v0' / LAST}" in (done.stdout + done.stderr).replace("\n", "")
    log = Log()
    resumed = fit(tmp_path, demo_root, tmp_path / RUN / "v0" / LAST, log)
    assert log.losses == uncut[1].losses[STEPS + 6 :]
    assert_same(resumed, uncut[0])

    # What Ctrl-C left scores nothing until it is calibrated, and says so.
    left = InTra.load_from_checkpoint(tmp_path / RUN / "v0" / BEST)
    with pytest.raises(RuntimeError, match="is not calibrated"):
        left(torch.rand(1, 3, 64, 64))


def test_resumed_training_is_what_is_tested(uncut: tuple, demo_root: Path, tmp_path: Path) -> None:
    """Engine.train gives the test the checkpoint that training was resumed from."""
    fit(tmp_path, demo_root, max_epochs=1)
    last = tmp_path / RUN / "v0" / LAST
    seed_everything(5)
    model = tiny_intra()
    datamodule = TextureDemo(demo_root, num_workers=0)
    results = tiny_engine(tmp_path, max_epochs=EPOCHS).train(model, datamodule=datamodule, ckpt_path=last)
    assert_same(model, uncut[0])
    assert_same(InTra.load_from_checkpoint(tmp_path / RUN / "v1" / BEST), uncut[0])
    assert Path(str(model.loaded_from)).parent == (tmp_path / RUN / "v1" / BEST).parent, "as its report says"
    expected = tiny_engine(tmp_path / "again").test(uncut[0], datamodule=datamodule)
    assert results[0] == expected[0]


class SpoilsLaterEpochs(Callback):
    def on_train_epoch_start(self, trainer: Trainer, pl_module: InTra) -> None:
        if trainer.current_epoch > 0:
            nn.init.normal_(pl_module.model.to_pixels.weight, std=3.0)


def test_a_run_cut_after_its_last_epoch_is_calibrated_when_it_goes_on(demo_root: Path, tmp_path: Path) -> None:
    class CrashError(Exception):
        pass

    class Worsens(Callback):
        """Makes the first epoch the best, so that the last weights are not those to test."""

        def on_train_epoch_start(self, trainer: Trainer, pl_module: InTra) -> None:
            if trainer.current_epoch == 1:
                nn.init.constant_(pl_module.model.to_pixels.bias, 9.0)

    def train(root: Path, ckpt_path: Path | None = None, crash: bool = False) -> tuple[InTra, dict]:
        seed_everything(5)
        model = tiny_intra()
        if crash:
            model.learn_normal = lambda _: (_ for _ in ()).throw(CrashError())
        engine = tiny_engine(root, max_epochs=2, callbacks=[Worsens()], logger=False)
        (metrics,) = engine.train(model, datamodule=TextureDemo(demo_root, num_workers=0), ckpt_path=ckpt_path)
        return model, metrics

    expected, metrics = train(tmp_path / "uncut")
    with pytest.raises(CrashError):
        train(tmp_path / "cut", crash=True)
    resumed, found = train(tmp_path / "cut", tmp_path / "cut" / RUN / "v0" / LAST)
    assert found == metrics
    assert_same(resumed, expected)
    assert_same(InTra.load_from_checkpoint(tmp_path / "cut" / RUN / "v1" / BEST), expected)


@pytest.mark.parametrize("moved", [False, True])
def test_the_best_epoch_of_before_stays_the_best(demo_root: Path, tmp_path: Path, moved: bool) -> None:
    first = fit(tmp_path, demo_root, max_epochs=1)
    run = tmp_path / RUN / "v0"
    if moved:
        shutil.move(run, tmp_path / "elsewhere")
        run = tmp_path / "elsewhere"
    engine = tiny_engine(tmp_path / "b", max_epochs=EPOCHS, callbacks=[SpoilsLaterEpochs()])
    resumed = tiny_intra()
    engine.fit(resumed, datamodule=TextureDemo(demo_root, num_workers=0), ckpt_path=run / LAST)
    assert_same(resumed, first)
    best = Path(engine.best_model_path)
    assert best == tmp_path / "b" / RUN / "v0" / BEST
    assert_same(InTra.load_from_checkpoint(best), first)


def test_a_best_checkpoint_that_is_gone_is_said_to_be(demo_root: Path, tmp_path: Path, caplog) -> None:
    fit(tmp_path, demo_root, max_epochs=1)
    (tmp_path / RUN / "v0" / BEST).unlink()
    with caplog.at_level(logging.WARNING):
        fit(tmp_path, demo_root, tmp_path / RUN / "v0" / LAST)
    assert "is not there any more" in caplog.text
    assert InTra.load_from_checkpoint(tmp_path / RUN / "v1" / BEST).post_processor.is_calibrated


def test_last_checkpoint_follows_every_epoch_not_only_better_ones(demo_root: Path, tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path, max_epochs=EPOCHS, callbacks=[SpoilsLaterEpochs()])
    engine.fit(tiny_intra(), datamodule=TextureDemo(demo_root, num_workers=0))
    stored = torch.load(tmp_path / RUN / "v0" / LAST, weights_only=True)
    assert stored["global_step"] == EPOCHS * STEPS
    (early_stopping,) = (state for name, state in stored["callbacks"].items() if name.startswith("EarlyStopping"))
    assert early_stopping["wait_count"] == EPOCHS - 1


def test_saving_takes_little_of_short_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    saved, now = [], [0.0]
    monkeypatch.setattr(checkpoints_module.time, "monotonic", lambda: now[0])

    class SlowDisk:
        global_step = 0
        world_size = 1
        strategy = SimpleNamespace(root_device="cpu", reduce=lambda values, reduce_op: values)

        def save_checkpoint(self, path: Path, weights_only: bool) -> None:
            assert not weights_only
            saved.append(now[0])
            now[0] += 2.0

    last, trainer = LastCheckpoint(), SlowDisk()
    for _ in range(100):
        now[0] += 10.0
        trainer.global_step += 1
        last.on_train_epoch_end(trainer, None)
    assert saved[1] - saved[0] >= 40
    assert 2.0 * len(saved) <= 0.06 * now[0]
    last.on_train_end(trainer, None)
    assert last._saved_step == trainer.global_step


def test_random_numbers_go_on_from_what_a_checkpoint_holds(tmp_path: Path) -> None:
    torch.save(random_state(), tmp_path / "state")
    first = (random.random(), np.random.rand(), torch.rand(2).tolist())
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == first


# ---- what is saved is whole ------------------------------------------------------------------------------------------


@contextmanager
def full_disk(largest: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes: writing more fails as it does where the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_checkpoint_of_before_whole(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    checkpoint = {"weights": torch.arange(100_000)}
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    with full_disk(50_000), pytest.raises(OSError, match=r"Could not write .*last\.ckpt .*still whole.*Make room"):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(100_000)}, path)
    assert torch.equal(torch.load(path, weights_only=True)["weights"], checkpoint["weights"])
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_leaves_the_checkpoint_of_before_whole(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"epoch": 1}, path)

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(OSError, match=r"Permission denied.*still whole"):
        AtomicCheckpointIO().save_checkpoint({"epoch": 2}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}


def test_a_disk_that_fills_up_while_training_leaves_a_run_that_goes_on(
    uncut: tuple, demo_root: Path, tmp_path: Path
) -> None:
    class FillsDisk(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: InTra) -> None:
            if trainer.current_epoch == 1:
                limit = full_disk(50_000)
                limit.__enter__()
                self.empty = lambda: limit.__exit__(None, None, None)

    filling = FillsDisk()
    seed_everything(5)
    engine = tiny_engine(tmp_path, max_epochs=EPOCHS, callbacks=[filling], logger=False)
    try:
        with pytest.raises(OSError, match=r"still whole.*go on from last\.ckpt"):
            engine.fit(tiny_intra(), datamodule=TextureDemo(demo_root, num_workers=0))
    finally:
        filling.empty()
    assert_same(fit(tmp_path, demo_root, tmp_path / RUN / "v0" / LAST), uncut[0])


# ---- losses that are no numbers --------------------------------------------------------------------------------------


class Diverges(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: InTra, *_: object) -> None:
        if trainer.global_step == STEPS + 3:
            pl_module.model.to_pixels.bias.data.fill_(torch.nan)


def test_a_loss_that_is_no_number_stops_training_and_spoils_no_checkpoint(demo_root: Path, tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path, max_epochs=EPOCHS, callbacks=[Diverges()])
    last = tmp_path / RUN / "v0" / LAST
    with pytest.raises(
        FloatingPointError,
        match=rf"loss is nan at step {STEPS + 4} \(epoch 1\).*train/good/\d+\.png.*last good checkpoint, {last}",
    ):
        engine.fit(tiny_intra(), datamodule=TextureDemo(demo_root, num_workers=0))
    for name in (LAST, BEST):
        state = torch.load(tmp_path / RUN / "v0" / name, weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for key, value in state.items() if key.startswith("model."))


def test_a_loss_that_is_no_number_is_found_before_saving_where_it_was_not_looked_at_yet() -> None:
    finite = FiniteLoss()
    finite._unseen = (torch.tensor(torch.inf), 7, torch.tensor([0]), ["a.png"])
    loader = SimpleNamespace(names=["of another pool.png"])  # the next step's, by now
    trainer = SimpleNamespace(train_dataloader=loader, checkpoint_callbacks=[], current_epoch=0)
    with pytest.raises(FloatingPointError, match=r"loss is inf at step 7 .*come from a\.png\."):
        finite.on_save_checkpoint(trainer, tiny_intra(), {})


def test_engine_keeps_one_best_and_one_last_checkpoint(uncut: tuple) -> None:
    folder = uncut[2] / "weights/lightning"
    assert sorted(folder.iterdir()) == [folder / "last.ckpt", folder / "model.ckpt"]


# ---- the Engine's own checkpoint -------------------------------------------------------------------------------------


def trainer_with(root: Path, **checkpoint: object) -> SimpleNamespace:
    kept = ModelCheckpoint(**{"dirpath": root / "weights/lightning", "filename": "model", **checkpoint})
    return SimpleNamespace(callbacks=[kept], default_root_dir=str(root), state=SimpleNamespace(fn="fit"))


def test_the_engines_own_checkpoint_is_exchanged_and_one_that_is_not_recognised_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_with(tmp_path)
    assert [type(one) for one in keep_last_and_best(trainer, best=True)] == [BestCheckpoint, LastCheckpoint]
    assert trainer.callbacks == []
    assert keep_last_and_best(trainer_with(tmp_path, monitor="val_loss"), best=True) == []
    assert not caplog.records
    for other in ({"filename": "last-epoch"}, {"dirpath": None, "filename": None}, {"dirpath": tmp_path / "mine"}):
        other = {"filename": "each", **other}
        assert keep_last_and_best(trainer_with(tmp_path, **other), best=False) == []
        assert not caplog.records  # the last epoch is what is to be kept
        assert keep_last_and_best(trainer_with(tmp_path, **other), best=True) == []
        assert "keeps the last epoch, not the best, and the last epoch will be tested" in caplog.text
        caplog.clear()


def test_the_engines_own_checkpoint_stays_where_the_last_epoch_is_to_be_kept(tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path)
    (last,) = keep_last_and_best(trainer, best=False)
    assert isinstance(last, LastCheckpoint)
    assert [type(one) for one in trainer.callbacks] == [ModelCheckpoint]


@pytest.mark.parametrize("model", [tiny_intra, tiny_cutpaste])
def test_snapshots_beside_the_engines_checkpoint_change_nothing(
    model: Callable, few: TextureDemo, tmp_path: Path
) -> None:
    outcomes = []
    every_other = LightningCheckpoint(tmp_path / "all", save_top_k=-1, every_n_epochs=2)
    for snapshots in ([], [OnExceptionCheckpoint(tmp_path / "failed"), every_other]):
        seed_everything(5)
        engine = tiny_engine(tmp_path / f"{len(snapshots)}", max_epochs=3, logger=False, callbacks=snapshots)
        trained = model(visualizer=False, learning_rate=0.5)  # painted worse from epoch to epoch
        engine.fit(trained, datamodule=few)
        kept = Path(keeper_of_the_best(engine.trainer).best_model_path)
        assert kept.with_name("last.ckpt").is_file()
        place = kept.relative_to(engine.trainer.default_root_dir)
        outcomes.append((place, torch.load(kept, weights_only=True)["epoch"]))
    assert outcomes[0] == outcomes[1]


def test_the_engine_of_this_version_is_recognised(demo_root: Path, tmp_path: Path, caplog) -> None:
    fit(tmp_path, demo_root, max_epochs=1)
    assert "keeps the last epoch" not in caplog.text
    assert (tmp_path / RUN / "v0" / BEST).is_file()
