# SPDX-License-Identifier: Apache-2.0
"""Every image has a picture of its own, in the folder of its own run."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from anomalib.data import ImageBatch, PredictDataset
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image.item_visualizer import visualize_image_item
from lightning.pytorch import Trainer
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from anomalib_intra import InTra, PatchSVDD, UnsaturatedPostProcessor
from anomalib_intra.components.visualizer import NamedImageVisualizer

from ..conftest import latest_prediction, tiny_engine, tiny_intra


def scoring_intra() -> InTra:
    model = tiny_intra(visualizer=True)
    model.post_processor.set_training_mean(torch.zeros(1, 1, 64, 64))
    return model


def scoring_svdd() -> PatchSVDD:
    torch.manual_seed(0)
    model = PatchSVDD((128, 128))
    model.model.bank_small = model.model.bank_big = torch.zeros(1, 64)
    return model


class Unnamed(Dataset):
    """Images without a path."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((3, 64, 64), index / 5)

    @staticmethod
    def collate_fn(images: list[torch.Tensor]) -> ImageBatch:
        return ImageBatch(image=torch.stack(images))


def pictures(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix)


def predict(model: InTra | PatchSVDD, root: Path, dataset: Dataset) -> Path:
    engine = tiny_engine(root, logger=False)
    engine.predict(model, dataloaders=DataLoader(dataset, batch_size=2, collate_fn=dataset.collate_fn))
    return latest_prediction(engine) / "images"


@pytest.mark.parametrize("make", [scoring_intra, scoring_svdd])
def test_images_without_a_path_have_a_picture_each(make: Callable, tmp_path: Path) -> None:
    folder = predict(make(), tmp_path, Unnamed())
    assert pictures(folder) == [f"image_{number:04}.png" for number in range(5)]


@pytest.mark.parametrize("make", [scoring_intra, scoring_svdd])
def test_images_of_equal_names_have_a_picture_each(make: Callable, tmp_path: Path) -> None:
    for shift in ("early", "late"):
        for name in ("0.png", "1.png"):
            (tmp_path / "parts" / shift / "line").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), "red" if shift == "late" else "blue").save(
                tmp_path / "parts" / shift / "line" / name
            )
    dataset = PredictDataset(tmp_path / "parts")
    dataset.image_filenames = sorted((tmp_path / "parts").rglob("*.png"))
    folder = predict(make(), tmp_path / "out", dataset)
    assert pictures(folder) == ["line/0.png", "line/0_2.png", "line/1.png", "line/1_2.png"]
    assert (folder / "line/0.png").read_bytes() != (folder / "line/0_2.png").read_bytes()


def test_a_model_that_is_tested_in_a_second_run_leaves_the_pictures_of_the_first(tmp_path: Path) -> None:
    for make in (scoring_intra, scoring_svdd):
        model = make()
        first = predict(model, tmp_path / f"{model.name}/first", Unnamed())
        before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
        second = predict(model, tmp_path / f"{model.name}/second", Unnamed())
        assert len(pictures(second)) == 5
        assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == before


def test_patch_svdd_draws_what_anomalib_draws(tmp_path: Path) -> None:
    ours, anomalibs = scoring_svdd(), scoring_svdd()
    anomalibs.visualizer = ImageVisualizer()
    for model in (ours, anomalibs):
        model.post_processor._pixel_threshold.fill_(1.0)  # maps are normalized, which anomalib's can draw
    Image.new("RGB", (64, 64), "red").save(tmp_path / "part.png")
    found, expected = (
        predict(model, tmp_path / str(number), PredictDataset(tmp_path / "part.png"))
        for number, model in enumerate((ours, anomalibs))
    )
    assert pictures(found) == pictures(expected)
    assert [(found / name).read_bytes() for name in pictures(found)] == [
        (expected / name).read_bytes() for name in pictures(expected)
    ]


@pytest.mark.parametrize(
    ("normalizes", "threshold", "drawn"), [(False, 2.0, (0.25, 0.5, 1.0)), (True, math.nan, (1.0, 1.0, 1.0))]
)
def test_raw_maps_are_drawn_on_one_scale_and_the_highest_values_highest(
    normalizes: bool, threshold: float, drawn: tuple, tmp_path: Path
) -> None:
    """anomalib's wrap around: 1.01 is drawn as 0."""

    def batch_of(values: tuple) -> ImageBatch:
        maps = torch.tensor(values)[:, None, None].expand(3, 8, 8)
        return ImageBatch(image=torch.zeros(3, 3, 8, 8), anomaly_map=maps.contiguous())

    model = PatchSVDD((128, 128), post_processor=UnsaturatedPostProcessor(enable_normalization=normalizes))
    model.post_processor._pixel_threshold.fill_(threshold)
    visualizer = NamedImageVisualizer(output_dir=tmp_path)
    trainer = Trainer(logger=False, accelerator="cpu")
    visualizer.on_predict_start(trainer, model)
    raw = batch_of((1.0, 2.0, 1000.0))
    visualizer.on_predict_batch_end(trainer, model, raw, raw, 0)
    assert torch.equal(raw.anomaly_map, batch_of((1.0, 2.0, 1000.0)).anomaly_map)
    for number, item in enumerate(batch_of(drawn)):
        expected = visualize_image_item(item, visualizer.fields, visualizer.overlay_fields)
        with Image.open(tmp_path / f"image_{number:04}.png") as picture:
            assert picture.tobytes() == expected.tobytes()
