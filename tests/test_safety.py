# SPDX-License-Identifier: Apache-2.0
"""A checkpoint from someone else cannot run code, and nothing here needs the network."""

import ast
import contextlib
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from anomalib.models.components import TimmFeatureExtractor
from lightning.pytorch import Callback, LightningModule, Trainer

import anomalib_intra
from anomalib_intra import InTra, PatchSVDD, TextureDemo
from anomalib_intra.benchmark import benchmark
from anomalib_intra.benchmark.runs import _load_backbone

from .conftest import tiny_engine, tiny_intra

PACKAGE = Path(anomalib_intra.__file__).parent


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable, tuple]:
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "code_was_run"


def checkpoint_of(model: LightningModule, **more: Any) -> dict[str, Any]:
    return {
        "state_dict": model.state_dict(),
        "hyper_parameters": dict(model.hparams),
        "pytorch-lightning_version": "2.6.0",
        "epoch": 0,
        "global_step": 0,
        **more,
    }


def save_zipped(checkpoint: dict[str, Any], path: Path) -> None:
    torch.save(checkpoint, path)


def save_legacy(checkpoint: dict[str, Any], path: Path) -> None:
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)


def save_bare(checkpoint: dict[str, Any], path: Path) -> None:
    path.write_bytes(pickle.dumps({"evil": checkpoint["evil"]}))


# ---- pickles ---------------------------------------------------------------------------------------------------------

LOADING = {
    "InTra.load_from_checkpoint": lambda path, *_: InTra.load_from_checkpoint(path),
    "PatchSVDD.load_from_checkpoint": lambda path, *_: PatchSVDD.load_from_checkpoint(path),
    "Engine.fit": lambda path, engine, data: engine.fit(tiny_intra(), datamodule=data, ckpt_path=path),
    "Engine.validate": lambda path, engine, data: engine.validate(tiny_intra(), datamodule=data, ckpt_path=path),
    "Engine.test": lambda path, engine, data: engine.test(tiny_intra(), datamodule=data, ckpt_path=path),
    "Engine.predict": lambda path, engine, data: engine.predict(tiny_intra(), datamodule=data, ckpt_path=path),
    "Engine.export": lambda path, engine, data: engine.export(tiny_intra(), "torch", ckpt_path=path),
    "backbone_weights": lambda path, *_: _load_backbone(
        SimpleNamespace(name="Padim", modules=lambda: [TimmFeatureExtractor("resnet18", ["layer1"], False)]), path
    ),
}


@pytest.mark.parametrize("save", [save_zipped, save_legacy, save_bare])
@pytest.mark.parametrize("load", LOADING)
def test_checkpoint_with_code_in_its_pickle_is_refused(
    demo: TextureDemo, tmp_path: Path, marker: Path, load: str, save: Callable
) -> None:
    path = tmp_path / "model.ckpt"
    save(checkpoint_of(tiny_intra(), evil=Payload(marker)), path)
    of_weights = load == "backbone_weights"
    refusal = "Weights only load failed" if of_weights else "holds objects that could run code, so it is not loaded"
    with pytest.raises(pickle.UnpicklingError if of_weights else ValueError, match=refusal):
        LOADING[load](path, tiny_engine(tmp_path), demo)
    assert not marker.exists()

    with contextlib.suppress(RuntimeError):  # of what follows the pickle
        torch.load(path, weights_only=False)  # there was something to guard against
    assert marker.exists()


def test_best_checkpoint_is_loaded_without_running_code_when_training_ends(
    demo: TextureDemo, tmp_path: Path, marker: Path
) -> None:
    class Exchange(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: InTra) -> None:
            torch.save(
                checkpoint_of(pl_module, evil=Payload(marker)),
                trainer.checkpoint_callback.best_model_path,
            )

    engine = tiny_engine(tmp_path, max_epochs=1, callbacks=[Exchange()])
    with pytest.raises(ValueError, match="holds objects that could run code, so it is not loaded"):
        engine.fit(tiny_intra(windows_per_image=1), datamodule=demo)
    assert not marker.exists()


# ---- what a checkpoint names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("instantiator", ["lightning.pytorch.cli.instantiate_module", "planted.build"])
@pytest.mark.parametrize("argument", ["pre_processor", "visualizer"])
def test_checkpoint_cannot_name_what_is_imported_to_build_the_model(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, instantiator: str, argument: str
) -> None:
    (tmp_path / "planted.py").write_text(
        f"open({str(marker)!r}, 'w')\n"
        "from anomalib.pre_processing import PreProcessor\n"
        "class Planted(PreProcessor): pass\n"
        "def build(kind, arguments): return kind()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    checkpoint = checkpoint_of(tiny_intra())
    checkpoint["hyper_parameters"] |= {"_instantiator": instantiator, argument: {"class_path": "planted.Planted"}}
    torch.save(checkpoint, tmp_path / "model.ckpt")
    with pytest.raises(TypeError, match="dict"):
        InTra.load_from_checkpoint(tmp_path / "model.ckpt")
    assert not marker.exists()
    assert "planted" not in sys.modules


def test_name_of_a_builder_alone_is_ignored(tmp_path: Path) -> None:
    model = tiny_intra()
    checkpoint = checkpoint_of(model)
    checkpoint["hyper_parameters"]["_instantiator"] = "lightning.pytorch.cli.instantiate_module"
    torch.save(checkpoint, tmp_path / "model.ckpt")
    loaded = InTra.load_from_checkpoint(tmp_path / "model.ckpt", patience=3)
    assert loaded.hparams == {**model.hparams, "patience": 3}
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.model.state_dict().items())


def test_checkpoint_cannot_name_other_transforms_than_those_anomalib_lists(tmp_path: Path) -> None:
    transform = {"class_path": "torchvision.transforms.v2.Lambda", "init_args": {"lambd": "os.system"}}
    checkpoint = checkpoint_of(tiny_intra(), anomalib_pre_processor_config={"transform": transform})
    torch.save(checkpoint, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="Unsupported transform class"):
        InTra.load_from_checkpoint(tmp_path / "model.ckpt")


def test_config_of_a_benchmark_cannot_run_code(tmp_path: Path, marker: Path) -> None:
    config = tmp_path / "benchmark.yaml"
    config.write_text(f"benchmark: !!python/object/apply:builtins.open [{marker}, w]\n")
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
        benchmark(config, tmp_path / "results")
    assert not marker.exists()


def test_package_calls_nothing_that_runs_code_from_files() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "yaml.load", "yaml.full_load", "yaml.unsafe_load"}, path
                if called == "torch.load":
                    assert "weights_only=True" in ast.unparse(node), path


# ---- network ---------------------------------------------------------------------------------------------------------


def test_tests_cannot_reach_the_network_but_processes_reach_each_other() -> None:
    for call in (socket.socket.connect, socket.socket.connect_ex):
        with socket.socket() as outside, pytest.raises(ConnectionRefusedError, match="must not use the network"):
            call(outside, ("192.0.2.1", 80))
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


def test_package_and_all_its_modules_are_imported_without_the_network() -> None:
    program = """
import importlib, pkgutil, socket, sys
def refuse(*arguments, **options):
    raise SystemExit(f"network used: {arguments[1:]}")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
import anomalib_intra
names = [module.name for module in pkgutil.walk_packages(anomalib_intra.__path__, "anomalib_intra.")]
for name in names:
    importlib.import_module(name)
assert "ray" not in sys.modules, "only --runner ray needs it"
print(len(names))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 30
