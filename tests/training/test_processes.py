# SPDX-License-Identifier: Apache-2.0
"""Several processes share a run's work and come to what one process comes to."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

from anomalib_intra import RIAD, CutPaste, InTra, OnePassInTra, PatchSVDD, TextureDemo
from anomalib_intra.data.normal_images import NormalImages, Share
from anomalib_intra.one_pass import lightning_model as one_pass
from anomalib_intra.training import agreement as agreement_module
from anomalib_intra.training.agreement import Agreement

from ..conftest import tiny_cutpaste, tiny_engine, tiny_intra, tiny_one_pass, tiny_riad
from ..data.test_samples import CountingImages, loader_of, samples_of

WORLD = 2


# ---- shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("count", [5, 7])
def test_every_draw_is_made_by_one_process_and_steps_are_those_of_one(count: int, world_size: int) -> None:
    dataset = CountingImages(count)
    alone = loader_of(dataset, windows_per_image=6, batch_size=11)
    shares = [
        loader_of(dataset, windows_per_image=6, batch_size=11, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    steps = samples_of(alone, dataset)
    of_each = [samples_of(share, dataset) for share in shares]
    assert {len(share) for share in shares} == {len(part) for part in of_each} == {len(of_each[0])}
    for number, parts in enumerate(zip(*of_each, strict=True)):
        sizes = {len(part[0]) for part in parts}
        assert len(sizes) == 1
        together = [[value for part in parts for value in part[field]] for field in range(len(parts[0]))]
        kept = len(steps[number][0]) // world_size * world_size
        assert together == [values[:kept] for values in steps[number]]


def test_a_step_too_small_for_the_processes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 samples cannot be shared by 3 processes"):
        loader_of(CountingImages(3), batch_size=2, world_size=3)


@pytest.mark.parametrize(("count", "world_size"), [(7, 2), (6, 4), (1, 3), (0, 2)])
def test_shares_of_images_are_whole_and_do_not_overlap(count: int, world_size: int) -> None:
    shares = [Share(list(range(count)), rank, world_size) for rank in range(world_size)]
    assert sorted(number for share in shares for number in share) == list(range(count))
    assert [len(share) for share in shares] == [len(list(share)) for share in shares]


def test_fewer_held_out_images_than_processes_are_validated_by_all() -> None:
    loaders = [DataLoader(list(range(count))) for count in (30, 2)]
    parts = [NormalImages.of(*loaders, None, rank=rank, world_size=3) for rank in range(3)]
    assert [len(part.held_out.sampler) for part in parts] == [2, 2, 2]
    assert [len(part.thresholds.sampler) for part in parts] == [1, 1, 0]
    assert [len(part.statistics.sampler) for part in parts] == [10, 10, 10]


# ---- a whole run -----------------------------------------------------------------------------------------------------


class Log(Callback):
    """Writes down what a process sees."""

    def __init__(self) -> None:
        self.seen: dict = {"val_loss": [], "windows": []}

    def on_train_batch_start(self, trainer: Trainer, pl_module: InTra, batch: object, batch_idx: int) -> None:
        if trainer.current_epoch == 0:
            names = [pl_module._loader.names[n] for n in batch.index.tolist()]
            fields = sorted(name for name, value in vars(batch).items() if torch.is_tensor(value) and name != "image")
            rows = zip(*(getattr(batch, field).tolist() for field in fields if field != "index"), strict=True)
            self.seen["windows"] += [[Path(name).name, *row] for name, row in zip(names, rows, strict=True)]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: InTra) -> None:
        self.seen["val_loss"].append(float(trainer.callback_metrics["val_loss"]))


def blackened(images: torch.Tensor, donors: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Spoil the same place of all images."""
    del donors, share
    replaced = torch.zeros_like(images[:, :1])
    replaced[..., 8:30, 20:50] = 1
    return images * (1 - replaced), replaced


def mean_of(model: InTra | OnePassInTra | PatchSVDD | RIAD | CutPaste) -> list[float]:
    """What a model has learned of normal images; RIAD learns thresholds alone."""
    if isinstance(model, PatchSVDD):
        return model.model.mean_image.flatten().tolist()
    mean = model.model.gaussian.mean if isinstance(model, CutPaste) else model.post_processor.training_mean
    return mean.flatten().tolist()


def weights_of(model: InTra | OnePassInTra | PatchSVDD | RIAD | CutPaste) -> torch.Tensor:
    return parameters_to_vector(model.model.parameters()).detach()


def run(kind: str, root: Path, demo_root: Path, devices: int) -> dict:
    """Train and test; give what this process saw."""
    seed_everything(5)
    log = Log()
    if kind == "intra":
        model = tiny_intra(patience=2, visualizer=True)
    elif kind == "one_pass":
        # Every process spoils and lights its images for itself and draws its radius; without that, too.
        one_pass.spoil = blackened
        model = tiny_one_pass(images_per_step=6, radii=(1,), vary_light=False, visualizer=True)
    elif kind == "riad":
        model = tiny_riad(images_per_step=6)
    elif kind == "cutpaste":
        model = tiny_cutpaste(visualizer=True)
    else:
        model = PatchSVDD((128, 128), pairs_per_image=2, pair_batch_size=32)
        # Every process draws the noise of its patches for itself; without it, the steps must be those of one process.
        model._loss_of = partial(model._loss_of, noise=0.0)
    before = weights_of(model)
    # 18 training images, 2 held out, 16 test images.
    datamodule = TextureDemo(demo_root, num_workers=0, eval_batch_size=7)
    several = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    epochs = {"intra": 3, "one_pass": 2, "riad": 3, "cutpaste": 1, "patch_svdd": 1}[kind]
    engine = tiny_engine(root, callbacks=[log], max_epochs=epochs, logger=False, **several)
    results = engine.train(model, datamodule=datamodule)
    processor = model.post_processor
    return {
        **log.seen,
        "metrics": results[0],
        "mean": mean_of(model),
        "thresholds": [float(processor.image_threshold), float(processor.pixel_threshold)],
        "weights": weights_of(model),
        "moved": float((weights_of(model) - before).norm()),
        "best": str(engine.best_model_path),
        "epoch": int(torch.load(engine.best_model_path, weights_only=True)["epoch"]),
        "folder": str(engine.trainer.default_root_dir),
    }


class SignalsItself(Callback):
    """Sends a signal to one process of several, in a step or in a validation."""

    def __init__(self, rank: int, where: str, number: int) -> None:
        self.rank, self.where, self.number = rank, where, number

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if self.where == "step" and trainer.global_rank == self.rank and trainer.global_step == 5:
            os.kill(os.getpid(), self.number)

    def on_validation_epoch_end(self, trainer: Trainer, *_: object) -> None:
        if self.where == "validation" and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


def run_until_stopped(rank: int, where: str, number: int, root: Path, demo_root: Path) -> None:
    seed_everything(5)
    several = {"strategy": "ddp", "devices": WORLD, "max_epochs": 1000, "logger": False}
    engine = tiny_engine(root, callbacks=[SignalsItself(rank, where, number)], **several)
    engine.fit(tiny_intra(), datamodule=TextureDemo(demo_root, num_workers=0))


def run_for_a_time(kind: str, root: Path, demo_root: Path) -> dict:
    """Train for two seconds, in which the second process is slower; give what this process ends with.

    ``kind`` says whose they are: the model's ``minutes`` or the trainer's ``max_time``.
    """

    class Slow(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            time.sleep(0.01 * trainer.global_rank)

    seed_everything(5)
    model = tiny_one_pass(images_per_step=2, minutes=2 / 60 if kind == "minutes" else None)
    several = {"strategy": "ddp", "devices": WORLD, "max_epochs": 1000, "logger": False}
    if kind == "max_time":
        several |= {"max_time": "00:00:00:02", "max_epochs": -1}
    engine = tiny_engine(root, callbacks=[Slow()], **several)
    engine.fit(model, datamodule=TextureDemo(demo_root, num_workers=0))
    rate = engine.trainer.optimizers[0].param_groups[0]["lr"]
    return {"weights": weights_of(model), "rate": rate, "steps": engine.trainer.global_step}


if __name__ == "__main__":
    if sys.argv[1] == "stopped":
        run_until_stopped(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), *map(Path, sys.argv[5:7]))
    kind, root, demo_root, out = sys.argv[1], *map(Path, sys.argv[2:5])
    timed = kind in ("minutes", "max_time")
    seen = run_for_a_time(kind, root, demo_root) if timed else run(kind, root, demo_root, WORLD)
    rank = torch.distributed.get_rank()
    torch.save(seen, out / f"{rank}.pt")


def command(*arguments: object) -> dict:
    """What subprocess runs this file with."""
    words = [sys.executable, "-m", "tests.training.test_processes", *map(str, arguments)]
    return {"args": words, "cwd": Path(__file__).parents[2], "capture_output": True, "text": True, "check": False}


@pytest.mark.parametrize(
    ("rank", "where", "sent"),
    [(1, "step", signal.SIGINT), (1, "validation", signal.SIGTERM), (0, "step", signal.SIGTERM)],
    ids=["Ctrl-C at the second", "second terminated", "first terminated"],
)
def test_a_signal_to_one_process_stops_all_at_one_step(
    demo_root: Path, tmp_path: Path, rank: int, where: str, sent: signal.Signals
) -> None:
    done = subprocess.run(timeout=200, **command("stopped", rank, where, int(sent), tmp_path, demo_root))
    assert done.returncode == 1, done.stderr[-4000:]
    assert "Go on with --ckpt_path" in done.stderr
    (last,) = tmp_path.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] >= 5


def test_processes_meet_every_few_steps_and_agree_on_what_one_of_them_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(agreement_module.time, "monotonic", lambda: now[0])
    met, seconds_of_a_step = [], (0.01, 0.02)
    asked: list[torch.Tensor] = []
    strategy = SimpleNamespace(root_device="cpu", reduce=lambda values, reduce_op: asked.append(values) or values)
    trainer = SimpleNamespace(world_size=2, strategy=strategy)
    processes = [Agreement(), Agreement()]
    for step in range(1000):
        now[0] += 0.02
        due = [process.is_due(trainer) for process in processes]
        assert due[0] == due[1]
        if due[0]:
            met.append(step)
            asked.clear()
            strategy.reduce = lambda values, reduce_op: asked.append(values) or values
            for process, seconds in zip(processes, seconds_of_a_step, strict=True):
                process._met_at = now[0] - seconds * process._steps
                process.any_of(trainer, False, process is processes[1])
            most = torch.stack(asked).amax(dim=0)
            strategy.reduce = lambda values, reduce_op, most=most: most
            for process in processes:
                assert process.any_of(trainer, False, False) == [False, True]
    assert met[0] == 0
    assert 8 <= len(met) <= 12  # every 2 seconds of 20


@pytest.mark.parametrize("kind", ["minutes", "max_time"])
def test_a_time_is_up_for_all_processes_at_one_step(kind: str, few_root: Path, tmp_path: Path) -> None:
    """Where each had a clock of its own, learning rates would differ, and one would wait for steps of the other."""
    done = subprocess.run(timeout=200, **command(kind, tmp_path / "several", few_root, tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))
    assert first["steps"] == second["steps"] > 1
    assert first["rate"] == second["rate"] < 1e-3  # which has come down
    assert torch.equal(first["weights"], second["weights"])


PATCH_SVDD = pytest.param("patch_svdd", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=["intra", "one_pass", "riad", "cutpaste", PATCH_SVDD])
def runs(request, few_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict, list[dict]]:
    kind, root = request.param, tmp_path_factory.mktemp("processes")
    done = subprocess.run(timeout=500, **command(kind, root / "several", few_root, root))
    assert done.returncode == 0, done.stderr[-4000:]
    several = [torch.load(root / f"{rank}.pt") for rank in range(WORLD)]
    return kind, run(kind, root / "alone", few_root, 1), several


def test_windows_of_an_epoch_are_shared_out_without_overlap(runs: tuple) -> None:
    _, alone, several = runs
    first, second = (sorted(map(tuple, part["windows"])) for part in several)
    assert len(first) == len(second)
    assert sorted(first + second) == sorted(map(tuple, alone["windows"]))


# The others have batch norms, which see the images of one process.
@pytest.mark.parametrize("runs", ["intra", "one_pass", PATCH_SVDD], indirect=True)
def test_losses_and_weights_are_those_of_one_process(runs: tuple) -> None:
    kind, alone, several = runs
    # Adam's first steps are as long for a gradient that is zero but for rounding as for any other. Patch-SVDD has such
    # gradients and takes four steps here: of what training moves, 2 % differ.
    share = 0.05 if kind == "patch_svdd" else 0.01
    for part in several:
        assert part["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-4)
        assert (part["weights"] - alone["weights"]).norm() < share * alone["moved"]


def test_processes_agree_with_each_other_to_the_last_digit(runs: tuple) -> None:
    _, _, (first, second) = runs
    for name in ("val_loss", "metrics", "mean", "thresholds", "best", "epoch"):
        assert first[name] == second[name], name
    assert torch.equal(first["weights"], second["weights"])


def test_processes_write_into_one_folder(runs: tuple) -> None:
    _, _, several = runs
    assert len({part["folder"] for part in several}) == 1
    folder = Path(several[0]["folder"])
    assert Path(several[0]["best"]) == folder / "weights/lightning/model.ckpt"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["latest", "v0"]
    assert (folder.parent / "latest").resolve() == folder
    assert len(list((folder / "images/test").rglob("*.png"))) == 16


def calibrated_alone(
    kind: str, checkpoint: str, few_root: Path, root: Path
) -> tuple[InTra | OnePassInTra | PatchSVDD | RIAD | CutPaste, dict]:
    """Calibrate and test the weights of several processes in one."""
    kinds = {"intra": InTra, "one_pass": OnePassInTra, "patch_svdd": PatchSVDD, "riad": RIAD, "cutpaste": CutPaste}
    model = kinds[kind].load_from_checkpoint(checkpoint)
    model.forget_calibration()
    results = tiny_engine(root, logger=False).test(model, datamodule=TextureDemo(few_root, num_workers=0))
    return model, results[0]


def test_mean_thresholds_and_metrics_are_those_of_one_process(runs: tuple, few_root: Path, tmp_path: Path) -> None:
    kind, _, (first, _) = runs
    model, metrics = calibrated_alone(kind, first["best"], few_root, tmp_path)
    processor = model.post_processor
    assert first["mean"] == pytest.approx(mean_of(model), abs=1e-6)
    thresholds = [float(processor.image_threshold), float(processor.pixel_threshold)]
    assert first["thresholds"] == pytest.approx(thresholds, rel=1e-6)
    assert first["metrics"] == pytest.approx(metrics, abs=1e-6)
