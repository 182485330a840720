# SPDX-License-Identifier: Apache-2.0
"""Command lines and configs, parsed as anomalib parses them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import Folder
from anomalib.data.utils import ValSplitMode
from anomalib.models import AnomalibModule
from lightning.pytorch import Trainer
from PIL import Image

from anomalib_intra import RIAD, CutPaste, InTra, MVTec, OnePassInTra, PatchSVDD, TextureDemo, cli
from anomalib_intra.components.anomaly_map import difference_map
from anomalib_intra.components.arguments import with_defaults
from anomalib_intra.training.refusals import refusing

from .conftest import CONFIGS, tiny_intra, tiny_one_pass

SIZES = {
    "carpet": 512, "grid": 512, "leather": 512, "tile": 512, "wood": 320, "bottle": 256, "cable": 256, "capsule": 320,
    "hazelnut": 256, "metal_nut": 256, "pill": 512, "screw": 320, "toothbrush": 256, "transistor": 256, "zipper": 512,
}  # fmt: skip


def printed_config(printed: str) -> str:
    return printed[printed.index("# anomalib==") :]  # a log line may stand before it


def read_config(printed: str) -> dict:
    return yaml.safe_load(printed_config(printed))


def test_anomalib_understands_the_short_name_once_the_model_is_named() -> None:
    """In a process that has not imported this package yet."""
    script = Path(sys.executable).with_name("anomalib")
    words = ["train", "--model", "anomalib_intra.InTra", "--data", "MVTec", "--print_config"]
    done = subprocess.run([script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    config = read_config(done.stdout)
    assert config["data"]["class_path"] == "anomalib_intra.MVTec"
    assert config["model"]["init_args"]["image_size"] == [256, 256]


@pytest.mark.parametrize("model", ["InTra", "OnePassInTra"])
def test_our_script_understands_short_names_in_any_order(model: str, monkeypatch, capsys) -> None:
    words = ["train", "--data", "MVTec", "--data.category", "screw", "--model", model, "--print_config"]
    monkeypatch.setattr(sys, "argv", ["anomalib-intra", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    config = read_config(capsys.readouterr().out)
    assert config["data"]["init_args"]["category"] == "screw"
    assert config["model"]["class_path"] == f"anomalib_intra.{model}"


SMALL = ["--model", "OnePassInTra", "--model.image_size", "[64, 64]", "--model.depth", "1"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "--model", "OnePassInTra", "--model.image_size", "[250, 250]"], "Images of 250 x 250 pixels do not"),
        (
            [
                *("train", *SMALL, "--model.post_processor", "InTraPostProcessor"),
                *("--model.post_processor.image_sensitivity", "2"),
            ],
            "image_sensitivity must be in (0, 1), got 2.0.",
        ),
        (["train", *SMALL, "--data", "TextureDemo", "--data.category", "wave"], "TextureDemo has no category 'wave'"),
        (["predict", *SMALL, "--data", "no/where", "--ckpt_path", "none.ckpt"], "Path does not exist: "),
        (
            ["train", "--config", "own_images", "--data.root", "."],
            "Path does not exist: HERE/good. Check the path; where",
        ),
        (["predict", *SMALL, "--data", ".", "--ckpt_path", "none.ckpt"], "Checkpoint file not found: "),
        (["predict", *SMALL, "--data", ".", "--ckpt_path", "part.png"], "part.png is no checkpoint, or not a "),
        (["export", *SMALL, "--export_type", "torch", "--ckpt_path", "part.png"], "part.png is no checkpoint"),
        (["predict", *SMALL, "--data", "."], "This model is not calibrated, so it cannot score images"),
        (["export", *SMALL, "--export_type", "torch"], "This OnePassInTra cannot score images yet"),
        (["yardsticks", "--data", "MVTec", "--data.category", "botle"], "MVTecAD has no category 'botle'"),
    ],
)
def test_mistakes_end_in_a_sentence(words: list[str], sentence: str, tmp_path: Path, monkeypatch, capsys) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "part.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["anomalib-intra", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1].removeprefix("anomalib-intra: ").removeprefix(f"{tmp_path}/")
    assert said.startswith(sentence.replace("HERE", str(tmp_path)))


def test_faults_of_programs_keep_their_traceback() -> None:
    with pytest.raises(ValueError, match="not raised by this package"), refusing():
        raise ValueError("not raised by this package")
    with pytest.raises(RuntimeError, match="size of tensor"), refusing():
        difference_map(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 32, 32))  # in this package, but by torch


def test_help_lists_our_commands_each_with_a_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["anomalib-intra", "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    ours, of_anomalib = capsys.readouterr().out.split("Commands of anomalib, but for its benchmark:")
    listed = [line.split(maxsplit=1) for line in ours.splitlines() if line.startswith("  ")]
    names = ("ablations", "benchmark", "map-options", "reproduce", "select-size", "speed", "synthetic-defects")
    assert [name for name, _ in listed] == [*names, "yardsticks"]
    assert all(line.endswith(".") for _, line in listed)
    assert "predict" in of_anomalib


@pytest.mark.parametrize(
    ("command", "more", "data"),
    [("predict", ["--data", "parts"], str), ("predict", [], TextureDemo), ("export", ["--export_type", "torch"], None)],
)
def test_commands_take_the_config_of_a_training(
    command: str, more: list[str], data: type | None, tmp_path: Path, monkeypatch, capsys
) -> None:
    words = ["train", *SMALL, "--data", "TextureDemo", "--optimizer", "AdamW", "--print_config"]
    monkeypatch.setattr(sys, "argv", ["anomalib-intra", *words])
    with pytest.raises(SystemExit):
        cli.main()
    (tmp_path / "config.yaml").write_text(printed_config(capsys.readouterr().out))
    built = cli.CommandLine([command, "--config", str(tmp_path / "config.yaml"), *more], run=False)
    assert built.model.image_size == (64, 64)
    assert data is None or type(built.datamodule) is data


def save(model: AnomalibModule, path: Path) -> str:
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return str(path)


@pytest.mark.parametrize("command", ["train", "fit", "test", "predict"])
def test_a_model_is_built_as_that_of_its_checkpoint(command: str, tmp_path: Path) -> None:
    path = save(tiny_one_pass(radii=(0, 1), minutes=7), tmp_path / "model.ckpt")
    words = [command, "--data", "TextureDemo", "--ckpt_path", path, "--model", "OnePassInTra"]
    model = cli.CommandLine(words, run=False).model
    assert (model.image_size, len(model.model.inpaint_embedding), model.model.radii) == ((64, 64), 32, (0, 1))
    assert model.minutes == 30  # no architecture
    # What was asked for stays, and is refused in a sentence where the checkpoint is loaded.
    model = cli.CommandLine([*words, "--model.depth", "3"], run=False).model
    assert (len(model.model.blocks), len(model.model.inpaint_embedding)) == (3, 32)
    save(tiny_intra(), tmp_path / "model.ckpt")
    assert cli.CommandLine(words, run=False).model.image_size == (256, 256)  # another class


def test_export_heeds_the_post_processor_that_is_given(tmp_path: Path, monkeypatch) -> None:
    model = tiny_one_pass()
    model.post_processor.set_training_mean(torch.zeros(1, 1, 64, 64))
    model.post_processor._image_threshold.fill_(0.5)
    save(model, tmp_path / "model.ckpt")
    asked = ["--model.post_processor", "InTraPostProcessor", "--model.post_processor.image_sensitivity", "0.3"]
    words = ["export", *SMALL, *asked, "--export_type", "torch", "--ckpt_path", str(tmp_path / "model.ckpt")]
    monkeypatch.setattr(sys, "argv", ["anomalib-intra", *words, "--export_root", str(tmp_path)])
    cli.main()
    exported = torch.load(tmp_path / "weights/torch/model.pt", weights_only=False)["model"]
    assert exported.post_processor.image_sensitivity == 0.3
    assert float(exported.post_processor.image_threshold) == 0.5
    assert len(exported.model.blocks) == 2  # the checkpoint's, not SMALL's


TRAINING_CONFIGS = sorted(
    path
    for path in CONFIGS.rglob("*.yaml")
    if path.stem not in ("benchmark", "patch_svdd", "riad", "cutpaste") and path.parent.stem != "ablations"
)


PAPER_METRICS = {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score", "pixel_AUPRO", "good_PSNR"}


@pytest.mark.parametrize("config", TRAINING_CONFIGS, ids=lambda path: path.stem)
def test_configs_build(config: Path, tmp_path: Path) -> None:
    with torch.device("meta"):  # the paper's weights take seconds to initialise
        built = AnomalibCLI(
            ["train", "--config", str(config), "--default_root_dir", str(tmp_path), "--model.depth", "1"], run=False
        )
    assert isinstance(built.model, OnePassInTra if config.stem in ("one_pass", "own_images", "quickstart") else InTra)
    assert {metric.name for metric in built.model.evaluator.test_metrics} == PAPER_METRICS
    if config.stem == "quickstart":
        assert isinstance(built.datamodule, TextureDemo)
        return
    if config.stem == "own_images":
        assert isinstance(built.datamodule, Folder)
        assert built.datamodule.val_split_mode == ValSplitMode.FROM_TRAIN
        assert built.datamodule.seed is not None  # a resumed run must not learn from what was held out
        return
    assert isinstance(built.datamodule, MVTec)
    category = config.stem if config.parent.stem == "mvtec" else "bottle"
    assert built.datamodule.category == category
    assert built.model.image_size == (SIZES[category],) * 2
    assert built.model.post_processor.original_size == (config.stem != "one_pass")


@pytest.mark.parametrize(("config", "kind"), [("patch_svdd", PatchSVDD), ("riad", RIAD), ("cutpaste", CutPaste)])
def test_configs_of_rivals_hold_the_defaults(
    config: str, kind: type[PatchSVDD | RIAD | CutPaste], tmp_path: Path
) -> None:
    arguments = ["train", "--config", str(CONFIGS / f"{config}.yaml"), "--default_root_dir", str(tmp_path)]
    built = AnomalibCLI(arguments, run=False)
    assert isinstance(built.model, kind)
    given = {name: tuple(x) if isinstance(x, list) else x for name, x in built.model.hparams.items()}
    assert with_defaults(kind, {**given, "evaluator": True}) == with_defaults(kind, {})
    assert {metric.name for metric in built.model.evaluator.test_metrics} == PAPER_METRICS


@pytest.mark.parametrize(
    ("config", "epochs", "of_paper"),
    [
        ("patch_svdd", 300, {"pairs_per_image": 100}),
        ("riad", 300, {"cell_sizes": [2, 4, 8, 16], "width": 64, "learning_rate": 1e-4, "images_per_step": 4}),
        # 32 images in their three forms: batches of 96.
        ("cutpaste", 256, {"patch_size": None, "learning_rate": 0.03, "images_per_step": 32}),
    ],
)
def test_configs_of_rivals_are_those_of_their_papers(config: str, epochs: int, of_paper: dict) -> None:
    written = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    assert written["trainer"]["max_epochs"] == epochs
    given = written["model"]["init_args"]
    assert {name: given[name] for name in of_paper} == of_paper
    assert given["image_size"] == [256, 256]


def test_there_is_a_config_for_every_category() -> None:
    assert {path.stem for path in (CONFIGS / "mvtec").glob("*.yaml")} == set(SIZES) == set(MVTec.categories)
