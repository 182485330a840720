# SPDX-License-Identifier: Apache-2.0
"""The flat and the mean-image yardstick, and the PSNR of good images."""

from pathlib import Path

import pytest
import torch
from anomalib.data.utils import read_image
from torchvision.transforms.v2.functional import resize

from anomalib_intra import TextureDemo
from anomalib_intra.components.batch import InTraBatch
from anomalib_intra.metrics import PSNR
from anomalib_intra.yardsticks import yardsticks


def test_psnr_is_that_of_normal_images_only() -> None:
    torch.manual_seed(0)
    images, reconstructions = torch.rand(2, 5, 3, 8, 8)
    metric = PSNR(prefix="good_")
    for part in (slice(0, 2), slice(2, 5)):
        labels = torch.tensor([0, 1, 1, 0, 0])[part]
        metric.update(InTraBatch(image=images[part], reconstruction=reconstructions[part], gt_label=labels))
    metric.update(InTraBatch(image=images[1:2], reconstruction=images[1:2], gt_label=torch.tensor([1])))
    error = ((images - reconstructions)[[0, 3, 4]] ** 2).mean()
    assert metric.name == "good_PSNR"
    assert metric.compute() == pytest.approx(float(10 * torch.log10(1 / error)), abs=1e-4)


def test_psnr_without_reconstructions_is_left_out() -> None:
    metric = PSNR()
    metric.update(InTraBatch(image=torch.rand(2, 3, 8, 8)))
    assert metric.compute() is None


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
