# SPDX-License-Identifier: Apache-2.0
"""A category end to end: in several sessions as in one go, the page, and what is refused."""

import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from anomalib_intra import OnePassInTra, cli
from anomalib_intra.experiments.loss_curve import read_curve
from anomalib_intra.experiments.reproduce import reproduce
from anomalib_intra.experiments.reproduce.page import figures

from ..conftest import TINY

EPOCHS = 2


@pytest.fixture(scope="module", autouse=True)
def short_forecast() -> Iterator[None]:
    """The steps of these tests take milliseconds: no need to time them for seconds at each start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anomalib_intra.experiments.reproduce.forecast._SECONDS", 0.05)
        yield


@pytest.fixture(scope="module")
def config(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config for ten training and a few test images, with a schedule and the evaluator of the paper's configs."""
    folder = tmp_path_factory.mktemp("reproduce")
    shutil.copytree(demo_root / "weave", folder / "data" / "weave")
    for kind in (path for path in (folder / "data/weave").glob("*/*") if path.is_dir()):
        for path in sorted(kind.rglob("*.png"))[10 if kind.parent.name == "train" else 3 :]:
            path.unlink()
    papers = yaml.safe_load((Path(__file__).parents[2] / "configs/mvtec/screw.yaml").read_text())
    settings = {
        "seed_everything": 1,
        "model": {
            "class_path": "anomalib_intra.InTra",
            "init_args": {
                **TINY,
                "image_size": [64, 64],
                "post_processor": papers["model"]["init_args"]["post_processor"],
                "evaluator": papers["model"]["init_args"]["evaluator"],
            },
        },
        "data": {
            "class_path": "anomalib_intra.TextureDemo",
            "init_args": {"root": str(folder / "data"), "num_workers": 0},
        },
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.5}},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "max_epochs": EPOCHS},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("whole")
    result = reproduce(["--config", str(config), "--data.category", "weave"], output=output)
    assert result is not None
    return output / "weave", result


@pytest.fixture
def command(config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """The command's words, to be added to; signal handlers are put back."""
    words = ["anomalib-intra", "reproduce", "weave", "--config", str(config), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    before = signal.getsignal(signal.SIGTERM)
    yield words
    signal.signal(signal.SIGTERM, before)


def run_command() -> int:
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code)
    return 0


def test_the_result_has_all_figures(whole) -> None:
    folder, result = whole
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["epochs"] == EPOCHS == len(read_curve(folder / "losses.csv"))
    assert result["windows"] == EPOCHS * 9 * TINY["windows_per_image"]  # one of ten images is held out
    assert not result["ended_by_itself"]
    table = figures(result)
    assert list(table.index) == ["this run", "flat, the training images' mean colour", "the mean training image"]
    assert table.notna().all(axis=None)
    assert table.loc["this run", "image AUROC"] == result["metrics"]["image_AUROC"]
    assert len(result["sessions"]) == 1
    assert result["sessions"][0]["epochs"] == EPOCHS


def test_the_page_says_that_the_training_may_have_been_too_short(whole) -> None:
    folder, result = whole
    page = (folder / "result.md").read_text()
    assert "**not until the validation loss had stopped improving**" in page
    assert f"{result['metrics']['good_PSNR']:.1f}" in page
    assert "patch_size: 16" in page
    assert "embed_dim: 32" in page
    assert (folder / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert (Path(result["test"]) / "report.html").is_file()


def test_the_papers_figures_stand_beside_those_of_its_categories(whole) -> None:
    _, result = whole
    paper = figures({**result, "category": "screw"}).loc["the paper"]
    assert paper["image AUROC"] == pytest.approx(0.957)
    assert paper["pixel AUROC"] == pytest.approx(0.995)
    assert paper[["AUPRO", "PSNR of good images (dB)"]].isna().all()


def test_several_sessions_end_as_one_does(whole, command: list[str], tmp_path: Path, capsys) -> None:
    folder, result = whole
    command += ["--minutes", "0"]
    lines = []
    while not (tmp_path / "weave/result.json").exists():
        assert run_command() == (0 if (tmp_path / "weave/result.json").exists() else 75)
        out = capsys.readouterr().out
        lines.append(out.splitlines()[0])
    assert lines[0].startswith(f"weave: 0 of {EPOCHS} epochs done, about 0:00:0")
    assert any(line.startswith(f"weave: 1 of {EPOCHS} epochs done") for line in lines)
    assert "| this run" in out
    resumed = json.loads((tmp_path / "weave/result.json").read_text())
    assert len(resumed["sessions"]) > EPOCHS
    assert resumed["metrics"] == result["metrics"]
    assert resumed["windows"] == result["windows"]
    best, uncut = (torch.load(path / "weights/model.ckpt", weights_only=True) for path in (tmp_path / "weave", folder))
    assert best["epoch"] == uncut["epoch"]
    for name, value in uncut["state_dict"].items():
        assert torch.equal(best["state_dict"][name].nan_to_num(), value.nan_to_num()), name


def test_the_configs_schedule_is_heeded_and_its_seed(whole) -> None:
    folder, _ = whole
    last = torch.load(folder / "weights/last.ckpt", weights_only=True)
    assert last["lr_schedulers"][0]["_last_lr"] == [pytest.approx(TINY["learning_rate"] * 0.5**EPOCHS)]
    assert last["draw_seed"] == 1


def test_a_finished_category_is_tested_again_with_fewer_epochs(whole, config: Path) -> None:
    folder, result = whole
    again = reproduce(["--config", str(config), "--data.category", "weave"], epochs=1, output=folder.parent)
    assert again is not None
    assert again["metrics"] == result["metrics"]
    assert again["epochs"] == EPOCHS


def test_mistakes_are_one_line(command: list[str], config: Path, monkeypatch, capsys) -> None:
    for words, named in (
        (["reproduce", "bottle", "--config", str(config)], "TextureDemo has no category 'bottle'"),
        (["reproduce", "bottle", "--config", "there/is/none.yaml"], "There is no config there/is/none.yaml"),
        (
            ["reproduce", "screw", "--config", "configs/mvtec/screw.yaml", "--data.root", "no/where"],
            "There is no folder no/where/screw: give the folder that holds the categories with --data.root",
        ),
    ):
        monkeypatch.setattr(sys, "argv", ["anomalib-intra", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        assert named in capsys.readouterr().err


def test_the_data_must_be_of_mvtec_ad(config: Path, tmp_path: Path) -> None:
    arguments = ["--config", str(config), "--data", "anomalib.data.Visa"]
    with pytest.raises(ValueError, match="published figures; the data is Visa"):
        reproduce(arguments, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the one-pass model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_pass(config: Path) -> Path:
    """The same with a one-pass model, neither epochs nor minutes, and no word to the trainer."""
    settings = yaml.safe_load(config.read_text())
    arguments = {"image_size": [64, 64], "embed_dim": 32, "depth": 1, "num_heads": 2}
    evaluator = settings["model"]["init_args"]["evaluator"]
    settings["model"] = {
        "class_path": "anomalib_intra.OnePassInTra",
        "init_args": {**arguments, "visualizer": False, "evaluator": evaluator},
    }
    del settings["trainer"], settings["lr_scheduler"]
    path = config.with_name("one_pass.yaml")
    path.write_text(yaml.safe_dump(settings))
    return path


def test_the_one_pass_model_trains_for_its_minutes_and_no_longer(one_pass: Path, tmp_path: Path, capsys) -> None:
    words = ["--config", str(one_pass), "--data.category", "weave", "--model.minutes", "0.05"]
    result = reproduce(words, output=tmp_path)
    assert result is not None
    out = capsys.readouterr().out
    assert "weave: 0 epochs done, about 0:00:03 of training left, without validation.\n" in out
    assert "weave, epoch 1: val_loss " in out
    assert result["ended_by_itself"]
    last = torch.load(tmp_path / "weave/weights/last.ckpt", weights_only=True)
    assert 3 <= last["seconds_trained"] < 20
    assert result["images"] == last["global_step"]  # an image in a step; the last epoch is not whole
    assert "windows" not in result
    page = (tmp_path / "weave/result.md").read_text()
    assert f"{result['images']:,} images, until its 0.05 minutes were over." in page
    assert "| this run" in page

    again = reproduce(words, output=tmp_path)
    assert again is not None
    assert "of training left" in (line := capsys.readouterr().out.splitlines()[0])
    assert "about 0:00:00" in line
    for name in ("epochs", "images", "metrics", "ended_by_itself"):
        assert again[name] == result[name], name


def test_the_minutes_of_a_call_are_not_those_of_the_model(one_pass: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    loss_of = OnePassInTra.loss_of

    def slow(model: OnePassInTra, batch: object) -> torch.Tensor:
        time.sleep(2)
        return loss_of(model, batch)

    monkeypatch.setattr(OnePassInTra, "loss_of", slow)
    words = ["reproduce", "weave", "--config", str(one_pass), "--output", str(tmp_path), "--minutes", "0"]
    monkeypatch.setattr(sys, "argv", ["anomalib-intra", *words, "--model.minutes", "0.05"])
    before = signal.getsignal(signal.SIGTERM)
    codes, lefts = [], []
    while not codes or codes[-1]:
        codes.append(run_command())
        lefts.append(capsys.readouterr().out.splitlines()[0].split("about 0:00:0")[1][0])
        assert len(codes) < 5
    signal.signal(signal.SIGTERM, before)
    # A step of two seconds, another, with which the time is over, and the one that ends the training.
    assert codes == [75, 75, 0]
    assert lefts[0] == "3" > lefts[1] > lefts[2] == "0"
    result = json.loads((tmp_path / "weave/result.json").read_text())
    assert result["ended_by_itself"]
    assert (result["images"], result["epochs"], len(result["sessions"])) == (3, 1, 3)


def test_without_minutes_the_one_pass_model_trains_for_the_epochs(one_pass: Path, tmp_path: Path, capsys) -> None:
    words = ["--config", str(one_pass), "--data.category", "weave", "--model.minutes", "null"]
    result = reproduce(words, epochs=2, output=tmp_path)
    assert result is not None
    assert capsys.readouterr().out.startswith("weave: 0 of 2 epochs done, about 0:00:0")
    assert (result["epochs"], result["images"], result["ended_by_itself"]) == (2, 2 * 9, False)
    assert "Trained for 2 epochs, 18 images." in (tmp_path / "weave/result.md").read_text()
