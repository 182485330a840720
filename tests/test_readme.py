# SPDX-License-Identifier: Apache-2.0
"""Every command of the README runs as it stands there, with settings behind it that make it small.

Commands are taken from the README, so that a new one is run, too, or fails here until it is known how. ``...`` in a
command stands for what the reader gives; here that is :data:`REST`.
"""

import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml

from anomalib_intra.training.named_configs import find_config

from .conftest import CONFIGS, TINY, TINY_ONE_PASS, InThisProcess
from .experiments.test_ablations import write_config
from .readme import BLOCKS, ROOT, SPANS, Words, commands, options_of_comments

PROGRAMS = ("anomalib", "anomalib-intra")
#: What sets up the environment, which tests cannot do; a test of the wheel and CI install the package.
SET_UP = (
    "python3 -m venv .venv",
    ".venv/bin/pip install .",
    ".venv/bin/pip install -e .[dev]",
    "source .venv/bin/activate",
)

FLAGS = {"visualizer": False, "image_size": (96, 96)}
SMALL_MODELS: dict[str, dict[str, Any]] = {
    "OnePassInTra": {**TINY_ONE_PASS, **FLAGS},
    "InTra": {**TINY, **FLAGS, "windows_per_image": 4},
    "RIAD": {"width": 4, **FLAGS},
}
TRAINER = ("--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")
LOADERS = ("--data.num_workers=0",)
MODEL = ("--model", "anomalib_intra.OnePassInTra")
DATA = ("--data", "MVTec")
CHECKPOINT = ("--ckpt_path", "PATH/TO/model.ckpt")

#: By subcommand: what stands for ``...``, and what makes the command small, beside the arguments of a small model.
REST: dict[str, Words] = {
    "train": [*MODEL, *DATA],
    "test": [*MODEL, *DATA, *CHECKPOINT],
    "predict": [*MODEL, "--data", "my_parts/new", *CHECKPOINT],
    "export": [*MODEL, *CHECKPOINT, "--export_type", "torch"],
    "synthetic-defects": ["--checkpoints", "[PATH/TO/model.ckpt]", *DATA],
    "select-size": ["--config", "intra"],
    "reproduce": ["--data.root", "PATH/TO/MVTecAD"],
    "ablations": ["--root", "datasets/TextureDemo"],
    "yardsticks": [*DATA],
}
SMALL: dict[str, Words] = {
    "train": [*TRAINER, *LOADERS],
    "test": [*TRAINER, *LOADERS],
    "predict": [*TRAINER],
    "export": [],
    "synthetic-defects": [*LOADERS],
    "select-size": [*TRAINER, *LOADERS, "--sizes", "48", "--epochs", "11"],
    "reproduce": [*TRAINER, *LOADERS, "--epochs", "1"],
    "ablations": ["--configs", "small_studies"],
    "yardsticks": [*LOADERS, "--image_size", "[64, 64]"],
    "benchmark": [],  # the config is small
    "speed": ["--model", "OnePassInTra", "--image_sizes", "[64]", "--batch_sizes", "[1]", "--training_steps", "1"],
}
OF_BLOCKS = [words for language, block in BLOCKS if language == "bash" for words in commands(block)]
IN_TEXT = [words for span in SPANS for words in commands(span) if words[0] in PROGRAMS]
OPTIONS = [words for span in SPANS for words in commands(span) if words[0].startswith("--")]
OPTIONS += [words for language, block in BLOCKS if language == "bash" for words in options_of_comments(block)]


# ---- running what stands there ---------------------------------------------------------------------------------------


def value_after(option: str, words: Words) -> str | None:
    return words[words.index(option) + 1] if option in words else None


def model_of(words: Words) -> str | None:
    """The model that a command is about, by its name or by that of its config."""
    if words[1] in ("synthetic-defects", "ablations", "yardsticks", "benchmark"):
        return None
    config = value_after("--config", words) or ("intra" if words[1] == "reproduce" else None)
    named = value_after("--model", words)
    return (named or yaml.safe_load(Path(find_config(config)).read_text())["model"]["class_path"]).split(".")[-1]


def completed(words: Words) -> Words:
    """Put what the reader gives in the place of ``...``."""
    if "..." not in words:
        return words
    at, rest = words.index("..."), REST[words[1]]
    if "--model" in words and "--model" in rest:
        rest = [word for word in rest if word not in MODEL]
    return [*words[:at], *rest, *words[at + 1 :]]


def small(words: Words) -> Words:
    """A command of the README with settings behind it that make it take a second or two."""
    if words[1] not in SMALL:
        pytest.fail(f"The README has a command that no test runs: {' '.join(words)}. Say in SMALL how.")
    words = [*completed(words), *SMALL[words[1]]]
    if (model := model_of(words)) is None:
        return words
    given = {name: "null" if value is None else value for name, value in SMALL_MODELS[model].items()}
    if words[1] in ("select-size", "speed"):  # these decide the size and how long
        given = {key: value for key, value in given.items() if key not in ("image_size", "visualizer")}
    as_list = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    arguments = [] if words[1] == "export" else [f"--model.{name}={value}" for name, value in as_list.items()]
    return [*words, *arguments]


def run(words: Words) -> None:
    """Run a command in this process, as its console script would."""
    program = Path(words[0]).name
    script = next(iter(entry_points(group="console_scripts", name=program)))
    before, code = signal.getsignal(signal.SIGTERM), None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *words[1:]])
        try:
            script.load()()
        except SystemExit as ended:
            code = ended.code
        finally:
            signal.signal(signal.SIGTERM, before)
    assert not code, " ".join(words)


# ---- where it stands -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(few_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what the README speaks of: data sets, a folder of parts, a trained model. All runs are in it."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "configs").symlink_to(CONFIGS)
    shutil.copytree(few_root / "weave", folder / "datasets/TextureDemo/weave")
    for category in ("datasets/MVTecAD/bottle", "PATH/TO/MVTecAD/bottle", "PATH/TO/MVTecAD/screw"):
        shutil.copytree(few_root / "weave", folder / category)
    for kind, images in {"good": "train/good", "bad": "test/hole", "new": "test/scratch"}.items():
        shutil.copytree(few_root / "weave" / images, folder / "my_parts" / kind)
    write_config(folder / "small_studies/position.yaml", {"InTra": {}})
    # A file goes before the config of that name.
    settings = yaml.safe_load((CONFIGS / "benchmark.yaml").read_text())
    settings["benchmark"]["image_size"] = [64, 64]
    settings["benchmark"]["data"]["init_args"] |= {"num_workers": 0, "category": {"grid": ["bottle"]}}
    settings["benchmark"]["model"]["grid"] = [{"name": "flat", "class_path": "anomalib_intra.yardsticks.Yardstick"}]
    (folder / "benchmark").write_text(yaml.safe_dump(settings))

    before = Path.cwd()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("multiprocessing.context.SpawnContext.Process", InThisProcess)
        for name in ("reproduce.forecast._SECONDS", "speed.command._SECONDS_OF_THE_CEILING"):
            patch.setattr(f"anomalib_intra.experiments.{name}", 0.02)
        patch.setattr("anomalib_intra.experiments.speed.ceiling._SECONDS_OF_A_TURN", 0.01)
        run([*small(["anomalib", "train", "..."]), "--trainer.max_epochs=1", "--default_root_dir=trained"])
        for name in ("model", "last"):
            (checkpoint,) = folder.glob(f"trained/**/v0/**/{name}.ckpt")
            shutil.copy(checkpoint, f"PATH/TO/{name}.ckpt")
        yield folder
    os.chdir(before)


# ---- the tests -------------------------------------------------------------------------------------------------------


def test_all_that_stands_there_is_known() -> None:
    assert {language for language, _ in BLOCKS} == {"bash", "python", "bibtex"}
    in_text = [words for span in SPANS for words in commands(span) if re.match(r"source$|(.*/)?(pip|py)", words[0])]
    others = [words for words in [*OF_BLOCKS, *in_text] if Path(words[0]).name not in PROGRAMS]
    tests = [words for words in others if " ".join(words) not in SET_UP]
    assert [words[:3] for words in tests] == [[".venv/bin/python", "-m", "pytest"]]
    assert {words[1] for words in [*OF_BLOCKS, *IN_TEXT] if Path(words[0]).name in PROGRAMS} == set(SMALL)


def test_what_sets_up_and_tests_is_what_ci_runs() -> None:
    (block,) = [block for _, block in BLOCKS if "pytest" in block]
    (line,) = [line for line in block.splitlines() if "pytest" in line]
    assert line in (ROOT / ".ci/run").read_text().splitlines()


@pytest.mark.parametrize("number", range(len(BLOCKS)), ids=lambda number: f"{number}-{BLOCKS[number][0]}")
def test_blocks_run(number: int, checkout: Path) -> None:
    language, block = BLOCKS[number]
    if language == "python":
        for given, less in {
            "minutes=30": "minutes=0.01, image_size=(64, 64), embed_dim=32, depth=2, num_heads=2",
            'category="bottle"': 'category="bottle", num_workers=0',
        }.items():
            assert given in block
            block = block.replace(given, less)
        names: dict[str, Any] = {}
        exec(block, names)
        assert names["predictions"]
        return
    for words in commands(block):
        if Path(words[0]).name in PROGRAMS:
            run(small(words))


def test_own_images_end_in_a_page_and_pictures(checkout: Path) -> None:
    (block,) = [block for _, block in BLOCKS if "--config own_images" in block]
    for words in commands(block):
        run([*small(words), "--model.visualizer=true", *(["--model.minutes=0.01"] if words[1] == "train" else [])])
    for results, images in {"my_parts/latest": "bad", "latest/predictions/*": "new"}.items():
        *_, folder = sorted((checkout / "results/OnePassInTra").glob(results))
        pictures = {path.name for path in (folder / "images").rglob(f"{images}/*.png")}
        assert pictures == {path.name for path in (checkout / "my_parts" / images).iterdir()}
        assert (folder / "report.html").is_file()


@pytest.mark.parametrize("words", IN_TEXT, ids=" ".join)
def test_commands_in_text_and_tables_run(words: Words, checkout: Path) -> None:
    run(small(words))


@pytest.mark.parametrize("option", OPTIONS, ids=" ".join)
def test_options_train_on_own_images(option: Words, checkout: Path) -> None:
    (train,) = [words for words in OF_BLOCKS if "own_images" in words]
    run([*small(train), *option])
