# SPDX-License-Identifier: Apache-2.0
"""The flat and the mean-image yardstick."""

from pathlib import Path

import pytest
import torch
from anomalib.data.utils import read_image
from torchvision.transforms.v2.functional import resize

from anomalib_intra import TextureDemo
from anomalib_intra.yardsticks import yardsticks


def test_yardsticks(demo_root: Path) -> None:
    table = yardsticks(TextureDemo(demo_root, num_workers=0), image_size=(64, 64))
    assert list(table.index) == ["flat, the training images' mean colour", "the mean training image"]
    assert set(table.columns) == {"image_AUROC", "pixel_AUROC", "pixel_AUPRO", "PSNR"}

    def images(pattern: str) -> torch.Tensor:
        files = sorted((demo_root / "weave").glob(pattern))
        return torch.stack([resize(read_image(path, as_tensor=True), [64, 64], antialias=True) for path in files])

    datamodule = TextureDemo(demo_root)
    datamodule.setup()
    held_out = {Path(path).name for path in datamodule.val_data.samples.image_path}
    mean_image = images("train/good/*.png")[
        [
            n
            for n, path in enumerate(sorted((demo_root / "weave/train/good").glob("*.png")))
            if path.name not in held_out
        ]
    ].mean(dim=0)
    good = images("test/good/*.png")
    for constant, psnr in zip((mean_image.mean(dim=(1, 2), keepdim=True), mean_image), table["PSNR"], strict=True):
        expected = 10 * torch.log10(1 / ((good - constant) ** 2).mean())
        assert psnr == pytest.approx(float(expected), abs=1e-3)
