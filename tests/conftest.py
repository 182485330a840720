# SPDX-License-Identifier: Apache-2.0
import logging
import os
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from anomalib.engine import Engine
from lightning.pytorch import Callback, Trainer, seed_everything

from anomalib_intra import RIAD, CutPaste, InTra, OnePassInTra, PatchSVDD, TextureDemo
from anomalib_intra.components.anomaly_map import difference_map
from anomalib_intra.components.reconstruction import Comparison
from anomalib_intra.training.console import WholeLines

warnings.filterwarnings("ignore", category=FutureWarning)

# On tensors this small, threads only wait for each other; the same holds for processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


CONFIGS = Path(__file__).parent.parent / "configs"
TINY = {
    "image_size": (64, 64),
    "window_size": 3,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "learning_rate": 1e-3,
    "windows_per_image": 8,
    "window_batch_size": 32,
}
TINY_ONE_PASS = {"image_size": (64, 64), "embed_dim": 32, "depth": 2, "num_heads": 2, "minutes": None}


def only_local(address: object) -> None:
    """Refuse a connection to anything but this machine."""
    is_local = not isinstance(address, tuple) or address[0] in ("localhost", "127.0.0.1", "::1")
    if not is_local:
        msg = f"Tests must not use the network: connection to {address} refused."
        raise ConnectionRefusedError(msg)


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """No test may talk to another machine; processes of one machine may talk to each other."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            allowed = getattr(socket.socket, name)

            def refuse(self: socket.socket, address: object, allowed: Callable = allowed) -> object:
                only_local(address)
                return allowed(self, address)

            patch.setattr(socket.socket, name, refuse)
        yield


@pytest.fixture(autouse=True)
def no_log_on_the_console() -> Iterator[None]:
    """Take out what our command line prints the log with, or doctests after it would find lines of Lightning's."""
    yield
    root = logging.getLogger()
    for handler in [one for one in root.handlers if isinstance(one, WholeLines)]:
        root.removeHandler(handler)


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generated data set, once for all tests."""
    root = tmp_path_factory.mktemp("data") / "TextureDemo"
    for category in TextureDemo.categories:
        TextureDemo(root, category).prepare_data()
    return root


@pytest.fixture(scope="session")
def few_root(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quarter of the generated images of weave: 18 to train on, 2 held out, 8 good and 8 anomalous ones to test."""
    root = tmp_path_factory.mktemp("few") / "TextureDemo"
    shutil.copytree(demo_root / "weave", root / "weave")
    for folder in (path for path in (root / "weave").glob("*/*") if path.is_dir()):
        kept = 20 if folder.parent.name == "train" else 8 if folder.name == "good" else 2
        for path in sorted(folder.iterdir())[kept:]:
            path.unlink()
    return root


@pytest.fixture
def demo(demo_root: Path) -> TextureDemo:
    return TextureDemo(demo_root, num_workers=0)


@pytest.fixture
def few(few_root: Path) -> TextureDemo:
    return TextureDemo(few_root, num_workers=0)


def tiny_engine(root: Path, **kwargs: object) -> Engine:
    kwargs = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, **kwargs}
    return Engine(default_root_dir=root, enable_model_summary=False, **kwargs)


class Fails(Callback):
    """Fails at the end of a training step; -1 for none."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == self.at:
            raise ValueError("no more")


def latest_prediction(engine: Engine) -> Path:
    """The folder that the last prediction of an Engine wrote into."""
    predictions = Path(engine.trainer.default_root_dir) / "predictions"
    return max(predictions.iterdir(), key=lambda folder: folder.stat().st_ctime_ns)


def tiny_intra(**kwargs: object) -> InTra:
    """A tiny model. It draws no pictures unless it is told to: they take three times as long as its training."""
    return InTra(**{**TINY, "visualizer": False, **kwargs})


def tiny_one_pass(**kwargs: object) -> OnePassInTra:
    """A tiny model, which draws no pictures unless it is told to, either."""
    return OnePassInTra(**{**TINY_ONE_PASS, "visualizer": False, **kwargs})


def tiny_patch_svdd(**kwargs: object) -> PatchSVDD:
    return PatchSVDD(**{"image_size": (128, 128), "pairs_per_image": 2, "pair_batch_size": 16, **kwargs})


def tiny_riad(**kwargs: object) -> RIAD:
    return RIAD(**{"image_size": (64, 64), "cell_sizes": (4, 16), "width": 4, "learning_rate": 3e-3, **kwargs})


def tiny_cutpaste(**kwargs: object) -> CutPaste:
    tiny = {"image_size": (64, 64), "samples_per_image": 1, "images_per_step": 6, "visualizer": False}
    return CutPaste(**{**tiny, **kwargs})


class Run(NamedTuple):
    """A training and a test that are over; who changes the model takes a copy or loads the checkpoint."""

    model: InTra | OnePassInTra | PatchSVDD | RIAD | CutPaste
    folder: Path
    metrics: dict[str, float]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "weights/lightning/model.ckpt"


def train_and_test(
    model: InTra | OnePassInTra | PatchSVDD | RIAD | CutPaste, root: Path, data_root: Path, max_epochs: int
) -> Run:
    engine = tiny_engine(root, max_epochs=max_epochs)
    (metrics,) = engine.train(model, datamodule=TextureDemo(data_root, num_workers=0))
    return Run(model, Path(engine.trainer.default_root_dir), metrics)


@pytest.fixture(scope="session")
def trained_intra(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tiny InTra, trained for three epochs and tested, with pictures and report."""
    seed_everything(0)
    return train_and_test(tiny_intra(visualizer=True), tmp_path_factory.mktemp("intra"), demo_root, max_epochs=3)


@pytest.fixture(scope="session")
def trained_one_pass(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tiny OnePassInTra, trained for six epochs and tested, with pictures and report."""
    seed_everything(0)
    return train_and_test(tiny_one_pass(visualizer=True), tmp_path_factory.mktemp("one_pass"), demo_root, max_epochs=6)


@pytest.fixture(scope="session")
def trained_patch_svdd(few_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A PatchSVDD, trained for an epoch on a few images and tested."""
    seed_everything(0)
    return train_and_test(
        tiny_patch_svdd(visualizer=False), tmp_path_factory.mktemp("patch_svdd"), few_root, max_epochs=1
    )


@pytest.fixture(scope="session")
def trained_riad(few_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tiny RIAD, trained for a few epochs on a few images and tested, with pictures and report."""
    seed_everything(0)
    return train_and_test(tiny_riad(), tmp_path_factory.mktemp("riad"), few_root, max_epochs=12)


@pytest.fixture(scope="session")
def trained_cutpaste(few_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A CutPaste of patches, which are small and so train fast: 108 steps in six epochs, and tested."""
    seed_everything(0)
    model = tiny_cutpaste(patch_size=32, learning_rate=0.1, samples_per_image=8, images_per_step=8)
    return train_and_test(model, tmp_path_factory.mktemp("cutpaste"), few_root, max_epochs=6)


class InThisProcess:
    """Runs at once what would have a process of its own, which takes long to start."""

    exitcode = 0

    def __init__(self, target: Callable, args: tuple) -> None:
        self.start = partial(target, *args)

    join = kill = lambda self: None


def compared(images: torch.Tensor, reconstructions: torch.Tensor, colour_weight: float = 0.0) -> Comparison:
    return Comparison(images, reconstructions, difference_map(images, reconstructions, colour_weight))
