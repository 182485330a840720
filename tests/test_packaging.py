# SPDX-License-Identifier: Apache-2.0
"""What a person has who installed the package and has no checkout."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from anomalib_intra import cli
from anomalib_intra.training.named_configs import config_names, find_config, with_config_paths

from .conftest import CONFIGS

ROOT = CONFIGS.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, since setuptools leaves folders beside the sources."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("src", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist'); build_meta.build_sdist('dist')"
    done = subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_the_wheel_has_the_configs_and_says_that_it_is_typed(installed: Path) -> None:
    package = installed / "anomalib_intra"
    inside, outside = ({path.relative_to(top) for path in top.rglob("*.*")} for top in (package / "configs", CONFIGS))
    assert inside == outside
    assert (package / "py.typed").is_file()
    assert (package / "report/page.html").is_file()


def test_the_source_distribution_has_the_configs(wheel: Path) -> None:
    (archive,) = wheel.parent.glob("*.tar.gz")
    shutil.unpack_archive(archive, wheel.parent)
    (folder,) = (path for path in wheel.parent.iterdir() if path.is_dir())
    assert len([*(folder / "configs").rglob("*.yaml")]) == len(config_names())


def test_an_installed_package_finds_its_configs(installed: Path, tmp_path: Path) -> None:
    # The module alone: all of the package takes seconds to import.
    module = installed / "anomalib_intra/training/named_configs.py"
    program = f"import runpy; print(runpy.run_path({str(module)!r})['find_config']('mvtec/bottle'))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == installed / "anomalib_intra/configs/mvtec/bottle.yaml"


@pytest.mark.parametrize("name", ["quickstart", "mvtec/bottle", "mvtec/bottle.yaml", "ablations/position"])
def test_a_config_is_found_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(find_config(name)).samefile(CONFIGS / f"{name.removesuffix('.yaml')}.yaml")


def test_a_file_goes_before_a_name_and_a_folder_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart").mkdir()
    assert Path(find_config("quickstart")).samefile(CONFIGS / "quickstart.yaml")
    Path("intra").write_text("mine: 1")
    assert find_config("intra") == "intra"


def test_names_are_understood_wherever_a_config_is_given() -> None:
    path = find_config("quickstart")
    assert with_config_paths(["train", "--config", "quickstart", "--model", "intra"]) == [
        *("train", "--config", path, "--model", "intra")
    ]
    assert with_config_paths(["fit", "-c", "quickstart", "--config=quickstart"]) == [
        *("fit", "-c", path, f"--config={path}")
    ]
    untouched = ["--config", "--help", "--config", "model: {}", "quickstart"]
    assert with_config_paths(untouched) == untouched


@pytest.mark.parametrize("command", [["train"], ["benchmark"], ["reproduce", "bottle"], ["select-size"]])
def test_an_unknown_name_is_refused_with_the_names(command: list[str], monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["anomalib-intra", *command, "--config", "quickstrat"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("anomalib-intra: There is no config quickstrat: give the path of a YAML file, or one of ")
    assert {"quickstart,", "mvtec/zipper."} <= set(line.split())


def test_a_category_without_a_config_is_refused(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["anomalib-intra", "reproduce", "bottel"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "There is no config mvtec/bottel: " in capsys.readouterr().err


def test_a_name_reaches_anomalibs_command_line(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["anomalib-intra", "train", "--config", "quickstart", "--print_config"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "class_path: anomalib_intra.TextureDemo" in capsys.readouterr().out
