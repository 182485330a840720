# SPDX-License-Identifier: Apache-2.0
"""anomalib's data sets of other layouts, which its data modules read with the pandas that is pinned."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from anomalib.data import AnomalibDataModule, Folder, MVTecAD2, MVTecLOCO
from PIL import Image

from anomalib_intra import InTraPostProcessor
from anomalib_intra.data.folders import warn_of_folders

from ..conftest import tiny_engine, tiny_intra


def draw(path: Path, seed: int, spot: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(100, 120, (64, 64, 3), dtype=np.uint8)
    if spot:
        pixels[20:40, 20:40] = 250
    Image.fromarray(pixels).save(path)


def mask(path: Path, rows: slice) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((64, 64), dtype=np.uint8)
    pixels[rows, 20:40] = 255
    Image.fromarray(pixels).save(path)


def normal(root: Path, *folders: str) -> None:
    for number, folder in enumerate(folders):
        for image in range(4):
            draw(root / folder / f"{image:03}.png", 10 * number + image)


def loco(root: Path) -> AnomalibDataModule:
    """MVTec LOCO: several masks for an image, in a folder of its own."""
    part = root / "pushpins"
    normal(part, "train/good", "validation/good", "test/good")
    for kind in ("logical_anomalies", "structural_anomalies"):
        for image in range(2):
            draw(part / "test" / kind / f"{image:03}.png", image, spot=True)
            mask(part / "ground_truth" / kind / f"{image:03}/000.png", slice(20, 30))
            mask(part / "ground_truth" / kind / f"{image:03}/001.png", slice(30, 40))
    return MVTecLOCO(root, "pushpins", num_workers=0)


def ad2(root: Path) -> AnomalibDataModule:
    """MVTec AD 2: public and private test images, of which the private ones have no labels."""
    part = root / "can"
    normal(part, "train/good", "validation/good", "test_public/good", "test_private", "test_private_mixed")
    for image in range(2):
        draw(part / "test_public/bad" / f"{image:03}.png", image, spot=True)
        mask(part / "test_public/ground_truth/bad" / f"{image:03}_mask.png", slice(20, 40))
    return MVTecAD2(root, "can", num_workers=0)


@pytest.mark.parametrize("original_size", [False, True])
@pytest.mark.parametrize("make", [loco, ad2])
def test_a_model_is_trained_and_tested(tmp_path: Path, make: Callable, original_size: bool) -> None:
    datamodule = make(tmp_path / "data")
    model = tiny_intra(visualizer=True, post_processor=InTraPostProcessor(original_size=original_size))
    engine = tiny_engine(tmp_path, max_epochs=1, logger=False)
    (metrics,) = engine.train(model, datamodule=datamodule)
    tested = 8 if make is loco else 6
    assert metrics["image_AUROC"] == 1.0
    assert metrics["pixel_AUROC"] > 0.6
    assert len(list((Path(engine.trainer.default_root_dir) / "images").rglob("*.png"))) == tested


def folders(root: Path, **given: str | list[str]) -> Folder:
    return Folder("parts", root=root, num_workers=0, val_split_mode="from_train", seed=0, **given)


def test_bad_images_below_the_good_ones_are_refused_before_a_training(tmp_path: Path) -> None:
    normal(tmp_path, "parts", "parts/bad")
    datamodule = folders(tmp_path, normal_dir="parts", abnormal_dir="parts/bad")
    with pytest.raises(ValueError, match=r"^4 images are among the good .*bad/000\.png: .* out of that of good ones"):
        tiny_engine(tmp_path / "r", max_epochs=1).fit(tiny_intra(), datamodule=datamodule)


@pytest.mark.parametrize("below", [False, True])
def test_good_test_images_that_are_trained_on_are_named(
    tmp_path: Path, below: bool, caplog: pytest.LogCaptureFixture
) -> None:
    test = "good/test" if below else "test"
    normal(tmp_path, "good", test, "bad")
    datamodule = folders(tmp_path, normal_dir="good", normal_test_dir=test, abnormal_dir="bad")
    datamodule.setup()
    warn_of_folders(datamodule)
    too_good = [message for message in caplog.messages if "scores will be too good" in message]
    assert len(too_good) == below
    assert all("4 training images are validated or tested on, too, such as" in message for message in too_good)


@pytest.mark.parametrize(
    ("given", "made", "level"),
    [
        ("good", ["good"], None),
        (["good", "other"], ["good", "other"], None),
        (".", ["good"], None),  # all from one folder below
        ("good", ["good/monday", "good/tuesday"], "INFO"),
        ("good", ["good", "good/old"], "WARNING"),
    ],
    ids=str,
)
def test_subfolders_of_training_images_are_told(
    tmp_path: Path, given: str | list[str], made: list[str], level: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    normal(tmp_path, *made)
    datamodule = folders(tmp_path, normal_dir=given)
    datamodule.setup()
    warn_of_folders(datamodule)
    told = [record for record in caplog.records if "Training images come from" in record.getMessage()]
    assert [record.levelname for record in told] == ([level] if level else [])
    for record in told:
        assert all(f" from {folder}" in record.getMessage() for folder in made)
