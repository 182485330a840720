# SPDX-License-Identifier: Apache-2.0
"""The choice of the image size: the rule, stopping and going on, what is written, and what is refused."""

import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from anomalib.cli.cli import AnomalibCLI
from pandas import Series

from anomalib_intra import InTra, OnePassInTra, cli
from anomalib_intra.experiments.loss_curve import LossCurve, read_curve
from anomalib_intra.experiments.select_size import select_size
from anomalib_intra.experiments.select_size.rule import averaged, choose
from anomalib_intra.experiments.select_size.selection import selection
from anomalib_intra.experiments.train_command import TrainCommand

from ..conftest import TINY

EPOCHS = 11
SIZES = (48, 64)


# ---- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("best", "size"),
    [
        ({256: 0.0120, 320: 0.0120, 512: 0.0120}, 256),  # no size is better
        ({256: 0.0120, 320: 0.0130, 512: 0.0140}, 256),  # the larger ones are worse
        ({256: 0.01200, 320: 0.01195, 512: 0.01000}, 256),  # the next is hardly better: the one after it has no say
        ({256: 0.0120, 320: 0.0130, 512: 0.0100}, 256),
        ({256: 0.0120, 320: 0.0110, 512: 0.01095}, 320),
        ({256: 0.0120, 320: 0.0110, 512: 0.0120}, 320),
        ({256: 0.0120, 320: 0.0110, 512: 0.0100}, 512),
        ({256: 0.0002, 320: 0.0001, 512: 0.0}, 512),  # 1e-4 itself is an improvement
        ({512: 0.0100, 256: 0.0120, 320: 0.0110}, 512),  # the order they are given in does not matter
        ({320: 0.5}, 320),
        ({256: 0.0120, 512: 0.0100}, 512),
    ],
)
def test_the_smallest_size_is_chosen_that_the_next_does_not_beat(best: dict, size: int) -> None:
    assert choose(best) == size


def test_losses_are_averaged_over_five_epochs_on_either_side_and_fewer_at_the_ends() -> None:
    losses = [0.5**epoch for epoch in range(30)]
    by_hand = [sum(part) / len(part) for part in (losses[max(0, e - 5) : e + 6] for e in range(30))]
    assert averaged(Series(losses)).tolist() == pytest.approx(by_hand, rel=1e-9)


def test_one_lucky_epoch_does_not_decide() -> None:
    lucky = [0.0120] * 30
    lucky[12] = 0.0110
    table = selection({256: Series([0.0120] * 30), 320: Series(lucky)}).set_index("image_size")
    assert table.loc[320, "best_loss"] == pytest.approx(0.0120 - 0.001 / 11)
    assert table["chosen"].to_dict() == {256: True, 320: False}


def test_fewer_epochs_than_the_window_are_refused() -> None:
    with pytest.raises(ValueError, match=r"averaged over 11 epochs .* there are 10"):
        averaged(Series([0.1] * 10))


# ---- whole selections ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config whose test images cannot be read, and which would stop after the second epoch."""
    folder = tmp_path_factory.mktemp("select-size")
    shutil.copytree(demo_root / "weave", folder / "data" / "weave")
    pictures = [path for path in (folder / "data" / "weave").rglob("*.png") if "train" not in path.parts]
    assert pictures
    for path in pictures:
        path.write_bytes(b"not a picture")
    for path in sorted((folder / "data" / "weave" / "train").rglob("*.png"))[10:]:
        path.unlink()
    model = {**TINY, "image_size": [96, 96], "windows_per_image": 4}
    settings = {
        "seed_everything": 1,
        "model": {"class_path": "anomalib_intra.InTra", "init_args": model},
        "data": {
            "class_path": "anomalib_intra.TextureDemo",
            "init_args": {"root": str(folder / "data"), "category": "weave", "num_workers": 0},
        },
        "trainer": {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "max_epochs": 2,
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.EarlyStopping",
                    "init_args": {"monitor": "val_loss", "patience": 1, "min_delta": 10.0},
                }
            ],
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    output = tmp_path_factory.mktemp("whole")
    return output, select_size(["--config", str(config)], SIZES, EPOCHS, output)


def test_every_size_is_trained_for_all_epochs_without_a_test_image(whole) -> None:
    output, table = whole
    assert list(table["image_size"]) == list(SIZES)
    for size in SIZES:
        assert list(read_curve(output / f"{size}x{size}" / "losses.csv").index) == list(range(EPOCHS))


def test_choice_curves_and_config_are_written(whole) -> None:
    output, table = whole
    pd.testing.assert_frame_equal(
        pd.read_csv(output / "selection.csv", float_precision="round_trip"), table, check_dtype=False
    )
    curves = pd.read_csv(output / "curves.csv")
    assert list(curves.groupby("image_size")["epoch"].max()) == [EPOCHS, EPOCHS]
    for size, curve in curves.groupby("image_size"):
        best = table.set_index("image_size").loc[size]
        assert curve["averaged"].min() == pytest.approx(best["best_loss"])
        assert curve["averaged"].idxmin() - curve.index[0] + 1 == best["best_epoch"]
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_anomalib_takes_the_written_config(whole, config: Path, tmp_path: Path) -> None:
    output, table = whole
    arguments = ["train", "--config", str(output / "config.yaml"), "--default_root_dir", str(tmp_path)]
    built = AnomalibCLI(arguments, run=False)
    chosen = int(table.loc[table["chosen"], "image_size"].item())
    assert isinstance(built.model, InTra)
    assert built.model.image_size == (chosen, chosen)
    assert built.model.windows_per_image == 4
    written, given = (yaml.safe_load(path.read_text()) for path in (output / "config.yaml", config))
    assert written["trainer"]["max_epochs"] == given["trainer"]["max_epochs"] == 2  # not those of the selection
    assert written["seed_everything"] == 1


class _Killed(BaseException): ...


def stop_once(monkeypatch: pytest.MonkeyPatch, size: int, epoch: int, how: type[BaseException]) -> None:
    """Stop after an epoch's loss was written and before its checkpoint is."""
    write = LossCurve.on_validation_end

    def write_and_stop(curve: LossCurve, trainer: object, module: object) -> None:
        write(curve, trainer, module)
        if curve.name.startswith(f"{size} x") and trainer.current_epoch == epoch:
            monkeypatch.setattr(LossCurve, "on_validation_end", write)
            raise how

    monkeypatch.setattr(LossCurve, "on_validation_end", write_and_stop)


def test_a_stopped_selection_ends_as_one_that_was_not_stopped(
    whole, config: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    command = (["--config", str(config)], SIZES, EPOCHS, tmp_path)
    stop_once(monkeypatch, size=48, epoch=0, how=KeyboardInterrupt)  # before there is any checkpoint
    with pytest.raises(KeyboardInterrupt):
        select_size(*command)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    stop_once(monkeypatch, size=64, epoch=6, how=_Killed)
    with pytest.raises(_Killed):
        select_size(*command)
    assert len(read_curve(tmp_path / "64x64" / "losses.csv")) == 7
    assert not (tmp_path / "selection.csv").exists()
    capsys.readouterr()

    table = select_size(*command)
    uncut_output, uncut = whole
    for size in SIZES:
        cut, whole_curve = (read_curve(folder / f"{size}x{size}" / "losses.csv") for folder in (tmp_path, uncut_output))
        assert cut.to_dict() == whole_curve.to_dict()
    pd.testing.assert_frame_equal(table, uncut, check_exact=True)
    # It repeated the epoch without a checkpoint, and left alone what was done.
    lines = [line for line in capsys.readouterr().out.splitlines() if "val_loss" in line]
    assert [line.split(":")[0] for line in lines] == [
        f"64 x 64 (2 of 2), epoch {epoch} of {EPOCHS}" for epoch in range(7, EPOCHS + 1)
    ]
    assert all(line.endswith("left") for line in lines)


def test_a_finished_selection_trains_nothing(whole, config: Path, monkeypatch) -> None:
    output, table = whole
    monkeypatch.setattr("anomalib_intra.experiments.train_command.TrainCommand.run", None)
    again = select_size(["--config", str(config)], SIZES, EPOCHS, output)
    pd.testing.assert_frame_equal(again, table)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sizes", "epochs", "named"),
    [
        ([], (48, 100), EPOCHS, "Images of 100 x 100 pixels do not work"),
        ([], (), EPOCHS, "no image sizes"),
        ([], SIZES, 10, "there are 10: train for 11 epochs or more"),
        (["--model.window_sise", "3"], SIZES, EPOCHS, "window_sise"),
        (
            ["--model", "Padim"],
            SIZES,
            EPOCHS,
            "trains an InTra or a OnePassInTra; the config has anomalib.models.*Padim",
        ),
        (["--data", "null"], SIZES, EPOCHS, "no data to train on"),
        (["--model", "null"], SIZES, EPOCHS, "needs a model and data: Option 'model' is required"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    config: Path, tmp_path: Path, arguments: list[str], sizes: tuple, epochs: int, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        select_size(["--config", str(config), *arguments], sizes, epochs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_selection_is_refused(whole, config: Path) -> None:
    output, _ = whole
    with pytest.raises(ValueError, match=r"another model.init_args.learning_rate: give another output folder"):
        select_size(["--config", str(config), "--model.learning_rate", "0.5"], SIZES, EPOCHS, output)


@pytest.mark.parametrize("metrics", [{}, {"val_loss": torch.tensor(torch.nan)}])
def test_an_epoch_without_a_finite_validation_loss_ends_the_selection(metrics: dict, tmp_path: Path) -> None:
    curve = LossCurve(tmp_path / "losses.csv", "48 x 48 (1 of 1)", EPOCHS)
    with pytest.raises(ValueError, match=r"48 x 48 \(1 of 1\) has no finite validation loss in epoch 4"):
        curve.on_validation_end(SimpleNamespace(current_epoch=3, callback_metrics=metrics), None)
    assert not curve.path.exists()


def test_the_command_prints_the_choice_and_mistakes_in_one_line(whole, config: Path, monkeypatch, capsys) -> None:
    output, _ = whole
    words = ["anomalib-intra", "select-size", "--output", str(output), "--sizes", "48", "64", "--config", str(config)]
    before = signal.getsignal(signal.SIGTERM)
    try:
        monkeypatch.setattr(sys, "argv", [*words, "--epochs", str(EPOCHS)])
        cli.main()
        assert f"Go on with: anomalib train --config {output / 'config.yaml'}" in capsys.readouterr().out
        monkeypatch.setattr(sys, "argv", [*words, "--epochs", "3"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("anomalib-intra select-size: The validation loss is")


def test_nothing_is_calibrated_for_the_sake_of_losses(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(*_: object) -> None:
        raise AssertionError("calibrated")

    monkeypatch.setattr(InTra, "learn_normal", called)
    monkeypatch.setattr(InTra, "set_thresholds", called)
    select_size(["--config", str(config)], (48,), EPOCHS, tmp_path)


def test_the_one_pass_model_is_trained_by_epochs_whatever_its_minutes(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = yaml.safe_load(config.read_text())
    arguments = {"image_size": [96, 96], "embed_dim": 32, "depth": 1, "num_heads": 2, "minutes": 1e-4}
    settings["model"] = {"class_path": "anomalib_intra.OnePassInTra", "init_args": arguments}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match="Images of 60 x 60 pixels do not work with patches of 8 x 8"):
        select_size(["--config", str(path)], (60, 64), EPOCHS, tmp_path / "out")

    minutes, configured = [], OnePassInTra.configure_optimizers
    monkeypatch.setattr(
        OnePassInTra, "configure_optimizers", lambda model: (minutes.append(model.minutes), configured(model))[1]
    )
    table = select_size(["--config", str(path)], SIZES, EPOCHS, tmp_path / "out")
    assert minutes == [None, None]
    assert list(table["image_size"]) == list(SIZES)
    for size in SIZES:
        assert len(read_curve(tmp_path / f"out/{size}x{size}/losses.csv")) == EPOCHS
    written = yaml.safe_load((tmp_path / "out/config.yaml").read_text())["model"]["init_args"]
    assert written["minutes"] == 1e-4
    assert written["image_size"] == [int(table.loc[table["chosen"], "image_size"].item())] * 2


def test_a_config_without_minutes_is_written_without_them() -> None:
    """Left out, they would be the default half hour, whatever epochs the config has."""
    command = TrainCommand(["--config", "configs/quickstart.yaml", "--model.image_size=[64,64]"])
    assert command.settings["model"]["init_args"]["minutes"] is None
    assert command.settings["model"]["init_args"]["image_size"] == [64, 64]
    papers = TrainCommand(["--config", "configs/intra.yaml", "--model.depth=1", "--model.embed_dim=16"])
    assert not [name for name in papers.settings["model"]["init_args"] if "." in name]
