# SPDX-License-Identifier: Apache-2.0
"""Long runs: memory stays flat. Slow; with ``-m slow -s`` it prints what it measured."""

import gc
from pathlib import Path

import numpy as np
import pytest
from anomalib.data import PredictDataset
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from anomalib_intra import InTra, TextureDemo

from ..conftest import tiny_engine, tiny_intra

pytestmark = pytest.mark.slow


def resident_mib() -> float:
    gc.collect()
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 2**10


class Watch(Callback):
    """Reads the memory in use every so many training steps or predicted batches."""

    def __init__(self, every: int) -> None:
        self.every, self.at, self.mib = every, [], []

    def _read(self, number: int) -> None:
        if number % self.every == 0:
            self.at.append(number)
            self.mib.append(resident_mib())

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self._read(trainer.global_step)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: InTra, outputs: object, batch: object, batch_idx: int, *_: object
    ) -> None:
        self._read(batch_idx)

    def growth(self) -> float:
        """MiB that a thousand steps add, by a straight line through the second half."""
        half = len(self.at) // 2
        return 1000 * float(np.polyfit(self.at[half:], self.mib[half:], 1)[0])


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's /proc")
def test_memory_stays_flat_over_2000_steps(demo: TextureDemo, tmp_path: Path) -> None:
    watch = Watch(every=50)
    model = tiny_intra(windows_per_image=60)
    tiny_engine(tmp_path, max_epochs=-1, max_steps=2000, callbacks=[watch], logger=False).fit(model, datamodule=demo)
    print(f"\n{watch.at[-1]} steps: {watch.mib[0]:.0f} to {watch.mib[-1]:.0f} MiB, {watch.growth():.1f} MiB per 1000")
    assert watch.at[-1] == 2000
    assert watch.growth() < 5


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's /proc")
def test_memory_stays_flat_over_500_predictions(demo: TextureDemo, tmp_path: Path) -> None:
    model = tiny_intra()
    tiny_engine(tmp_path, max_epochs=1, logger=False).fit(model, datamodule=demo)
    images = PredictDataset(demo.root / "weave/test/good")
    images.image_filenames = (images.image_filenames * 25)[:500]
    watch = Watch(every=10)
    tiny_engine(tmp_path / "p", callbacks=[watch], logger=False).predict(
        model, dataloaders=DataLoader(images, collate_fn=images.collate_fn), return_predictions=False
    )
    print(f"\n500 predictions: {watch.mib[0]:.0f} to {watch.mib[-1]:.0f} MiB, {watch.growth():.1f} MiB per 1000")
    assert watch.at[-1] == 490
    assert watch.growth() < 5
