# SPDX-License-Identifier: Apache-2.0
"""With original_size, what a model says about a part of a file lies where that part is."""

from pathlib import Path

import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.data.transforms import ExportableCenterCrop, SquarePad
from anomalib.metrics import AnomalibMetric, Evaluator
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import seed_everything
from torch.nn.functional import interpolate
from torchmetrics import MeanMetric
from torchvision.transforms.v2 import CenterCrop, Compose, Pad, RandomHorizontalFlip, Resize

from anomalib_intra import InTraPostProcessor, TextureDemo
from anomalib_intra.data.file_view import FileView, file_view

from ..conftest import tiny_engine, tiny_intra


@pytest.mark.parametrize(
    ("transforms", "expected"),
    [
        ([], (0, 0, 90, 60)),
        ([Resize((64, 64))], (0, 0, 90, 60)),
        ([CenterCrop(50)], (20, 5, 50, 50)),
        ([ExportableCenterCrop(50), Resize((64, 64))], (20, 5, 50, 50)),
        ([Resize((180, 120)), CenterCrop(60)], (30, 15, 30, 30)),
        ([Resize(30), CenterCrop(30), Resize((64, 64))], (16, 0, 60, 60)),
        ([Pad(10), Resize((64, 64))], (-10, -10, 110, 80)),
        ([Pad(10, padding_mode="edge")], (-10, -10, 110, 80)),
        ([SquarePad(), Resize((64, 64))], (0, -15, 90, 90)),
        ([CenterCrop((100, 40))], (-5, 10, 100, 40)),
        ([Pad(10), CenterCrop((90, 60))], (0, 0, 90, 60)),
    ],
)
def test_the_part_of_a_file_that_is_seen(transforms: list, expected: tuple) -> None:
    assert file_view(transforms, (90, 60)) == expected


def test_what_moves_pixels_otherwise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"original_size=True .* RandomHorizontalFlip .* set original_size=False"):
        file_view([Resize((64, 64)), RandomHorizontalFlip(p=1.0)], (90, 60))


def test_maps_are_put_back_pixel_by_pixel() -> None:
    maps = torch.rand(2, 1, 8, 8)
    inside = FileView(2, 3, 8, 8).place(maps, (12, 14))
    assert torch.equal(inside[..., 2:10, 3:11], maps)
    assert inside.sum() == pytest.approx(float(maps.sum()))
    assert torch.equal(FileView(-1, -2, 8, 8).place(maps, (6, 4)), maps[..., 1:7, 2:6])
    whole = interpolate(maps, size=(30, 20), mode="bilinear", align_corners=False)
    assert torch.equal(FileView(0, 0, 30, 20).place(maps, (30, 20)), whole)


class Edge(AnomalibMetric, MeanMetric):
    """Mean of the maps where a crop of 64 of 128 pixels sees nothing."""

    def update(self, batch: object) -> None:
        maps = torch.as_tensor(batch.anomaly_map).clone()
        assert maps.shape[-2:] == (128, 128)
        maps[..., 32:96, 32:96] = 0
        MeanMetric.update(self, maps)


@pytest.mark.parametrize("by_datamodule", [True, False])
def test_a_test_puts_the_map_of_a_crop_into_the_file(demo_root: Path, tmp_path: Path, by_datamodule: bool) -> None:
    seed_everything(0)
    crop = {"augmentations": CenterCrop(64)} if by_datamodule else {}
    own = {} if by_datamodule else {"pre_processor": PreProcessor(Compose([Resize((128, 128)), CenterCrop(64)]))}
    metrics = [Edge(fields=["anomaly_map"])]
    model = tiny_intra(
        visualizer=False,
        post_processor=InTraPostProcessor(original_size=True),
        evaluator=Evaluator(test_metrics=metrics),
        **own,
    )
    datamodule = TextureDemo(demo_root, num_workers=0, **crop)
    engine = tiny_engine(tmp_path, max_epochs=1, logger=False)
    (results,) = engine.train(model, datamodule=datamodule)
    assert results["Edge"] == 0
    for batch in engine.predict(model, datamodule=datamodule):
        maps = torch.as_tensor(batch.anomaly_map).squeeze(1)
        assert maps[:, 32:96, 32:96].amax() > 0
        assert maps[:, :32].amax() == maps[:, 96:].amax() == maps[..., :32].amax() == maps[..., 96:].amax() == 0
    assert model.post_processor._gone_through == []


def test_a_flip_is_refused_where_maps_must_be_put_back(demo_root: Path, tmp_path: Path) -> None:
    model = tiny_intra(post_processor=InTraPostProcessor(original_size=True))
    flipped = MVTecAD(demo_root, "weave", num_workers=0, augmentations=RandomHorizontalFlip(p=1.0))
    with pytest.raises(ValueError, match="original_size=True needs to know where pixels come from"):
        tiny_engine(tmp_path, max_epochs=1).train(model, datamodule=flipped)
