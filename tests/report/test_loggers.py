# SPDX-License-Identifier: Apache-2.0
"""What anomalib's loggers get of a run: metrics, and the pictures of the report's cases."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anomalib.loggers import AnomalibTensorBoardLogger
from anomalib.loggers.base import ImageLoggerBase
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image

from anomalib_intra import TextureDemo

from ..conftest import tiny_engine, tiny_intra


class PictureBook(ImageLoggerBase, DummyLogger):
    """Keeps pictures as anomalib's MLflow and W&B loggers do: the latter sends them when it is told to save."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: dict[str, np.ndarray] = {}
        self.sent: set[str] = set()

    def add_image(self, image: np.ndarray, name: str | None = None, **kwargs: Any) -> None:
        assert kwargs["global_step"] > 0  # TensorBoard and Comet refuse a picture without it
        self.pictures[name] = image

    def save(self) -> None:
        self.sent = set(self.pictures)


@pytest.fixture(scope="module")
def logged(few_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PictureBook]:
    root, book = tmp_path_factory.mktemp("loggers"), PictureBook()
    loggers = [AnomalibTensorBoardLogger(str(root / "tensorboard")), CSVLogger(root / "csv"), book]
    engine = tiny_engine(root, max_epochs=1, logger=loggers, log_every_n_steps=1)
    engine.train(tiny_intra(visualizer=True, windows_per_image=24), datamodule=TextureDemo(few_root, num_workers=0))
    return root, book


def test_tensorboards_file_holds_the_metrics_and_the_pictures(logged: tuple) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = logged[0] / "tensorboard/default/version_0"
    found = events.EventAccumulator(str(folder), size_guidance={events.IMAGES: 0}).Reload()
    assert {"train_loss_step", "train_loss_epoch", "val_loss", "image_AUROC", "pixel_AUROC"} <= set(
        found.Tags()["scalars"]
    )
    tags = found.Tags()["images"]
    assert len(tags) == 16
    assert {tag.split("/")[0] for tag in tags} == {
        "Lowest-scored_anomalous_images", "Highest-scored_normal_images",
        "Highest-scored_anomalous_images", "Lowest-scored_normal_images",
    }  # fmt: skip
    with Image.open(BytesIO(found.Images(tags[0])[0].encoded_image_string)) as picture:
        assert picture.size == (4 * 256 + 3 * 4, 24 + 256)  # the reconstruction is the second of four panels
        assert np.asarray(picture.convert("L"))[24:, 260:516].std() > 1


def test_csv_logger_gets_the_metrics(logged: tuple) -> None:
    (file,) = logged[0].rglob("metrics.csv")
    table = pd.read_csv(file)
    for column in ("train_loss_epoch", "val_loss", "image_AUROC", "pixel_AUROC"):
        assert table[column].notna().sum() == 1


def test_loggers_that_take_images_get_a_handful_with_names_that_files_can_have(logged: tuple) -> None:
    book = logged[1]
    assert len(book.pictures) == 16 == len(book.sent)
    for name, picture in book.pictures.items():
        folder, file = name.split("/")
        assert (folder + file).replace("-", "").replace("_", "").replace(".", "").isalnum()
        assert file.endswith(".png")
        assert picture.shape == (280, 1036, 3)
        assert picture.dtype == np.uint8


def test_without_a_visualizer_loggers_get_no_pictures(few: TextureDemo, tmp_path: Path) -> None:
    book = PictureBook()
    engine = tiny_engine(tmp_path, max_epochs=1, logger=book, limit_train_batches=1, limit_test_batches=1)
    engine.train(tiny_intra(visualizer=False), datamodule=few)
    assert book.pictures == {}


def test_mlflow_keeps_the_pictures_as_files(few: TextureDemo, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from anomalib.loggers import AnomalibMLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = AnomalibMLFlowLogger(tracking_uri=(tmp_path / "mlruns").as_uri())
    engine = tiny_engine(tmp_path, max_epochs=1, logger=logger, limit_train_batches=1, limit_test_batches=1)
    engine.train(tiny_intra(visualizer=True), datamodule=few)
    assert len(list((tmp_path / "mlruns").rglob("*scored*/*.png"))) == 16


def test_weights_and_biases_keeps_the_pictures_offline(few: TextureDemo, tmp_path: Path, monkeypatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    from anomalib.loggers import AnomalibWandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = AnomalibWandbLogger(save_dir=tmp_path, offline=True)
    engine = tiny_engine(tmp_path, max_epochs=1, logger=logger, limit_train_batches=1, limit_test_batches=1)
    engine.train(tiny_intra(visualizer=True), datamodule=few)
    wandb.finish()
    assert logger.image_list == []
    assert len(list((tmp_path / "wandb").glob("offline-run-*/files/media/images/*.png"))) == 16
