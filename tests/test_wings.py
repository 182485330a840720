# SPDX-License-Identifier: Apache-2.0
"""Imports run down only: from the command line over experiments, benchmark and models to what they share."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import anomalib_intra

PACKAGE = Path(anomalib_intra.__file__).parent

#: From top to bottom. A wing may import from the floors below its own, and from itself.
FLOORS = [
    {"cli"},
    {"experiments"},
    {"benchmark"},
    {"yardsticks"},
    {"intra", "one_pass", "patch_svdd", "riad", "cutpaste", "metrics"},
    {"components"},
    {"training", "data", "report"},
]

#: Files that need neither Lightning nor anomalib, nor anything that does. (The torch model of Patch-SVDD is not among
#: them: its memory bank is a buffer whose size is unknown until it is filled, which anomalib's mixin loads.)
PURE_TORCH = [
    "components/anomaly_map",
    "components/arguments",
    "components/checkpoint_fit",
    "components/reconstruction",
    "components/similarity",
    "cutpaste/augmentation",
    "cutpaste/gaussian",
    "cutpaste/torch_model",
    "data/image_range",
    "data/images",
    "data/samples",
    "data/symmetries",
    "intra/attention",
    "intra/grid",
    "intra/loss",
    "intra/second_pass",
    "intra/torch_model",
    "intra/windows",
    "one_pass/attention",
    "one_pass/augmentation",
    "one_pass/comparison",
    "one_pass/fast_attention",
    "one_pass/loss",
    "one_pass/optimizer",
    "one_pass/spoiling",
    "one_pass/torch_model",
    "patch_svdd/loss",
    "patch_svdd/pairs",
    "riad/loss",
    "riad/masks",
    "riad/msgms",
    "riad/torch_model",
]


def floor_of(wing: str) -> int:
    (floor,) = [number for number, wings in enumerate(FLOORS) if wing in wings]
    return floor


def imported_by(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute here"
            yield node.module or ""


def wing_of(module: str) -> str:
    return module.split(".")[1]


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE or file.stem != "__init__")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_run_down_only(file: Path) -> None:
    here = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module in imported_by(file):
        if not module.startswith("anomalib_intra"):
            continue
        assert module != "anomalib_intra", "the package's face is for users"
        there = wing_of(module)
        assert there == here or floor_of(there) > floor_of(here), f"{here} imports {module}"


def test_no_file_of_a_wing_imports_one_that_imports_it() -> None:
    # Faces are left out: they hand names on.
    imports = {
        "anomalib_intra." + ".".join(file.relative_to(PACKAGE).with_suffix("").parts): set(imported_by(file))
        for file in FILES
        if file.stem != "__init__"
    }
    reached: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {path} {module}"
        if module in reached:
            return
        for below in imports[module] & imports.keys():
            visit(below, (*path, module))
        reached.add(module)

    for module in imports:
        visit(module, ())


@pytest.mark.parametrize("face", [file for file in FILES if file.stem == "__init__"], ids=lambda face: face.parent.name)
def test_a_folders_face_only_hands_names_on(face: Path) -> None:
    for node in ast.parse(face.read_text(encoding="utf-8")).body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        assert is_text or is_all or isinstance(node, ast.ImportFrom), ast.unparse(node)


def test_pure_torch_runs_where_neither_lightning_nor_anomalib_can_be_imported() -> None:
    # Bare packages stand in for anomalib_intra and its wings, so that no __init__ runs.
    modules = ["anomalib_intra." + name.replace("/", ".") for name in PURE_TORCH]
    program = f"""
import sys, types, importlib
for name in ("anomalib", "lightning", "pytorch_lightning"):
    sys.modules[name] = None
for wing in ("", ".components", ".cutpaste", ".data", ".intra", ".one_pass", ".patch_svdd", ".riad"):
    package = types.ModuleType("anomalib_intra" + wing)
    package.__path__ = [{str(PACKAGE)!r} + wing.replace(".", "/")]
    sys.modules["anomalib_intra" + wing] = package
for name in {modules!r}:
    importlib.import_module(name)
import torch
from anomalib_intra.intra.torch_model import InpaintingTransformer
model = InpaintingTransformer((16, 16), patch_size=4, window_size=3, embed_dim=8, depth=1, num_heads=2)
print(tuple(model.reconstruct(torch.rand(1, 3, 16, 16)).shape))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "(1, 3, 16, 16)", done.stderr
