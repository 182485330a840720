# SPDX-License-Identifier: Apache-2.0
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from anomalib.engine import Engine

from anomalib_intra import InTra, TextureDemo
from anomalib_intra.components.anomaly_map import difference_map
from anomalib_intra.components.reconstruction import Comparison

warnings.filterwarnings("ignore", category=FutureWarning)

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other


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


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generated data set, once for all tests."""
    root = tmp_path_factory.mktemp("data") / "TextureDemo"
    for category in TextureDemo.categories:
        TextureDemo(root, category).prepare_data()
    return root


@pytest.fixture
def demo(demo_root: Path) -> TextureDemo:
    return TextureDemo(demo_root, num_workers=0)


def tiny_engine(root: Path, **kwargs: object) -> Engine:
    kwargs = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, **kwargs}
    return Engine(default_root_dir=root, enable_model_summary=False, **kwargs)


def tiny_intra(**kwargs: object) -> InTra:
    return InTra(**{**TINY, **kwargs})


def compared(images: torch.Tensor, reconstructions: torch.Tensor, colour_weight: float = 0.0) -> Comparison:
    return Comparison(images, reconstructions, difference_map(images, reconstructions, colour_weight))
