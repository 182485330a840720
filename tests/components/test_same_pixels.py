# SPDX-License-Identifier: Apache-2.0
"""Training, calibration, test, prediction and export see the same pixels, however images are cropped or padded."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import AnomalibDataModule, MVTecAD
from anomalib.data.transforms import SquarePad
from anomalib.data.utils import read_image
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, Trainer, seed_everything
from PIL import Image, ImageOps
from torchvision.transforms.v2 import (
    CenterCrop,
    ColorJitter,
    Compose,
    Grayscale,
    Pad,
    RandomAutocontrast,
    RandomHorizontalFlip,
    RandomRotation,
    Resize,
    Transform,
)

from anomalib_intra import InTra, InTraPostProcessor, OnePassInTra, PatchSVDD
from anomalib_intra.components.calibrated_module import CalibratedModule
from anomalib_intra.yardsticks import Yardstick

from ..conftest import tiny_engine, tiny_intra, tiny_one_pass

SIDE = 128


class Seen(Callback):
    """Writes down what the test sees and gives."""

    def __init__(self) -> None:
        self.batches: list = []
        self.images: dict[str, torch.Tensor] = {}
        self.scores: dict[str, float] = {}

    def on_test_batch_end(self, trainer: Trainer, pl_module: CalibratedModule, outputs: object, *_: object) -> None:
        self.batches.append(outputs)  # which the post-processor has yet to score

    def on_test_epoch_end(self, trainer: Trainer, pl_module: CalibratedModule) -> None:
        for item in (item for batch in self.batches for item in batch):
            name = "/".join(Path(item.image_path).parts[-2:])
            self.images[name] = torch.as_tensor(item.image)
            self.scores[name] = float(item.pred_score)


def changed(demo_root: Path, root: Path, change: Callable[[Image.Image], Image.Image], tested: int = 3) -> Path:
    """A part of the generated data, each image and mask changed."""
    for kind, count in (
        ("train/good", 12),
        ("test/good", tested),
        ("test/hole", tested),
        ("ground_truth/hole", tested),
    ):
        for path in sorted((demo_root / "weave" / kind).iterdir())[:count]:
            target = root / "weave" / kind / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            change(Image.open(path)).save(target)
    return root


def framed(image: Image.Image) -> Image.Image:
    """Surround an image with clutter, other for each; masks with nothing."""
    size = (image.height + 64, image.width + 64)
    if image.mode == "RGB":
        clutter = np.random.default_rng(int(np.asarray(image).sum())).integers(0, 255, (*size, 3), dtype=np.uint8)
        whole = Image.fromarray(clutter)
    else:
        whole = Image.new("L", size[::-1])
    whole.paste(image, (32, 32))
    return whole


def squared(image: Image.Image) -> Image.Image:
    """Continue the edges of an image of 64 x 128 pixels above and below; those of masks end there."""
    pixels, wide = np.asarray(image), ((32, 32), (0, 0), (0, 0))
    return Image.fromarray(np.pad(pixels, wide, "edge") if image.mode == "RGB" else np.pad(pixels, wide[:2]))


@pytest.fixture(scope="module")
def files(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    changes = {
        "plain": lambda image: image,
        "framed": framed,
        "small": lambda image: ImageOps.crop(image, 16),
        "small and padded": lambda image: ImageOps.expand(ImageOps.crop(image, 16), 16),
        "wide": lambda image: image.crop((0, 32, 128, 96)),
        "wide and padded": lambda image: squared(image.crop((0, 32, 128, 96))),
    }
    root = tmp_path_factory.mktemp("changed")
    return {name: changed(demo_root, root / name, change) for name, change in changes.items()}


def data(root: Path, **kwargs: object) -> AnomalibDataModule:
    return MVTecAD(root, "weave", num_workers=0, seed=0, **{"val_split_mode": "from_train", **kwargs})


def build(kind: str, side: int = SIDE, **kwargs: object) -> CalibratedModule:
    seed_everything(0)
    kwargs = {"image_size": (side, side), "visualizer": False, **kwargs}
    if kind == "OnePassInTra":
        return tiny_one_pass(**kwargs)
    if kind == "PatchSVDD":
        return PatchSVDD(pairs_per_image=2, pair_batch_size=16, **kwargs)
    return Yardstick(flat=False, **kwargs) if kind == "Yardstick" else tiny_intra(**kwargs)


def run(model: CalibratedModule, datamodule: AnomalibDataModule, root: Path) -> tuple[list[torch.Tensor], Seen]:
    """Train and test; give what was learned from normal images, and what the test saw."""
    seen = Seen()
    engine = tiny_engine(root, max_epochs=2, logger=False, callbacks=[seen])
    (engine.test if isinstance(model, Yardstick) else engine.train)(model, datamodule=datamodule)
    if isinstance(model, PatchSVDD):
        learned = [model.model.mean_image, model.model.bank_small, model.model.bank_big]
    else:
        learned = [model.post_processor.training_mean, model.post_processor.training_std]
    return [*learned, model.post_processor.image_threshold, model.post_processor.pixel_threshold], seen


def crop(**kwargs: object) -> dict:
    return {"pre_processor": PreProcessor(CenterCrop(SIDE)), **kwargs}


WAYS = {
    "cropped by the datamodule": ("plain", "framed", {"augmentations": CenterCrop(SIDE)}, {}),
    "cropped by the datamodule, no pre-processor": (
        "plain", "framed", {"augmentations": CenterCrop(SIDE)}, {"pre_processor": False},
    ),
    "cropped by the pre-processor": ("plain", "framed", {}, {"pre_processor": PreProcessor(CenterCrop(SIDE))}),
    "resized and cropped by the pre-processor": (
        "plain", "framed", {}, {"pre_processor": PreProcessor(Compose([Resize((192, 192)), CenterCrop(SIDE)]))},
    ),
    "held-out images are training images": (
        "plain", "framed", {"augmentations": CenterCrop(SIDE), "val_split_mode": "same_as_test"}, {},
    ),
    "padded by the datamodule": ("small and padded", "small", {"augmentations": Pad(16)}, {}),
    "padded by the pre-processor": ("small and padded", "small", {}, {"pre_processor": PreProcessor(Pad(16))}),
    "other augmentations in training": (
        "plain",
        "framed",
        {"train_augmentations": CenterCrop(SIDE), "val_augmentations": Pad(8), "test_augmentations": CenterCrop(SIDE)},
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["InTra", "OnePassInTra", "PatchSVDD", "Yardstick"])
@pytest.mark.parametrize("way", WAYS)
def test_files_changed_beforehand_and_images_changed_on_the_way_give_the_same(
    kind: str, way: str, files: dict[str, Path], tmp_path: Path
) -> None:
    changed_files, whole_files, of_data, of_model = WAYS[way]
    split = {"val_split_mode": of_data.get("val_split_mode", "from_train")}
    learned, seen = run(build(kind), data(files[changed_files], **split), tmp_path / "a")
    others, others_seen = run(build(kind, **of_model), data(files[whole_files], **of_data), tmp_path / "b")
    for one, other in zip(learned, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    for name, score in seen.scores.items():
        torch.testing.assert_close(seen.images[name], others_seen.images[name], rtol=0, atol=1e-6)
        assert score == pytest.approx(others_seen.scores[name], abs=1e-6), name


@pytest.mark.parametrize(
    ("changed_files", "whole_files", "transform"),
    [
        ("plain", "framed", Compose([CenterCrop(128), Resize((64, 64))])),
        ("wide and padded", "wide", Compose([SquarePad(), Resize((64, 64))])),
    ],
)
def test_a_resize_that_comes_after_a_crop_does_come_after_it(
    changed_files: str, whole_files: str, transform: Compose, files: dict[str, Path], tmp_path: Path
) -> None:
    learned, seen = run(build("InTra", 64), data(files[changed_files]), tmp_path / "a")
    model = build("InTra", 64, pre_processor=PreProcessor(transform))
    others, others_seen = run(model, data(files[whole_files]), tmp_path / "b")
    torch.testing.assert_close(learned[0], others[0], rtol=0, atol=1e-6)
    assert seen.scores == pytest.approx(others_seen.scores, abs=1e-6)
    # So do prediction on files, the model itself, and what a checkpoint restores.
    tested = sorted((files[whole_files] / "weave/test/hole").iterdir())
    loaded = InTra.load_from_checkpoint(tmp_path / "b/InTra/MVTecAD/weave/v0/weights/lightning/model.ckpt").eval()
    predicted = tiny_engine(tmp_path, logger=False).predict(model, data_path=tested[0].parent)
    for path, one in zip(tested, [item for batch in predicted for item in batch], strict=True):
        score = seen.scores[f"hole/{path.name}"]
        assert float(one.pred_score) == pytest.approx(score, abs=1e-6)
        with torch.no_grad():
            for itself in (model.eval(), loaded):
                given = itself(read_image(path, as_tensor=True)[None])
                assert float(given.pred_score) == pytest.approx(score, abs=1e-5)


def test_a_datamodule_alone_may_resize(files: dict[str, Path], tmp_path: Path) -> None:
    learned, seen = run(build("InTra", 64), data(files["plain"]), tmp_path / "a")
    datamodule = data(files["plain"], augmentations=Resize((64, 64), antialias=True))
    others, others_seen = run(build("InTra", 64, pre_processor=False), datamodule, tmp_path / "b")
    torch.testing.assert_close(learned[0], others[0], rtol=0, atol=1e-6)
    assert seen.scores == pytest.approx(others_seen.scores, abs=1e-6)


def test_plain_loaders_are_calibrated_as_they_validate(files: dict[str, Path], tmp_path: Path) -> None:
    datamodule = data(files["framed"], augmentations=CenterCrop(SIDE))
    learned, _ = run(build("InTra"), datamodule, tmp_path / "a")
    model = build("InTra")
    loaders = datamodule.train_dataloader(), datamodule.val_dataloader()
    tiny_engine(tmp_path / "b", logger=False).fit(model, *loaders)
    torch.testing.assert_close(learned[0], model.post_processor.training_mean, rtol=0, atol=1e-6)


def test_a_pre_processor_with_other_hooks_is_heeded_once(files: dict[str, Path], tmp_path: Path) -> None:
    class Darker(PreProcessor):
        """Changes images in its hooks, as anomalib allows."""

        def __init__(self) -> None:
            super().__init__()
            self.calls: list[type] = []

        def on_train_batch_start(self, trainer: object, pl_module: object, batch: object, batch_idx: int) -> None:
            self.calls.append(type(batch))
            batch.image = batch.image * 0.5

        on_validation_batch_start = on_test_batch_start = on_train_batch_start

    darker = changed(files["plain"], tmp_path / "files", lambda image: image.point(lambda value: value // 2))
    pre_processor = Darker()
    _, seen = run(build("InTra", pre_processor=pre_processor), data(files["plain"]), tmp_path / "a")
    assert {kind.__name__ for kind in pre_processor.calls} == {"ImageBatch", "InTraBatch"}  # and never samples of them
    _, others = run(build("InTra"), data(darker), tmp_path / "b")
    assert seen.scores == pytest.approx(others.scores, abs=0.02)  # files are rounded to bytes


@pytest.mark.parametrize("kind", ["InTra", "PatchSVDD", "Yardstick"])
@pytest.mark.parametrize(
    "transform", [RandomHorizontalFlip(), Compose([Resize((SIDE, SIDE)), RandomRotation(5)]), ColorJitter(0.2)]
)
def test_random_pre_processors_are_refused(kind: str, transform: object) -> None:
    with pytest.raises(ValueError, match=r"pre-processor has (Random|Color)\w+, .* as train_augmentations"):
        build(kind, pre_processor=PreProcessor(transform))


def test_random_changes_of_test_images_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    flips = data(files["plain"], augmentations=RandomHorizontalFlip())
    for does in ("fit", "test"):
        with pytest.raises(ValueError, match=r"does to test images has RandomHorizontalFlip.* as train_augmentations"):
            getattr(tiny_engine(tmp_path), does)(build("InTra"), datamodule=flips)


def test_random_changes_of_training_images_are_left_out_of_calibration(files: dict[str, Path], tmp_path: Path) -> None:
    learned, _ = run(build("Yardstick"), data(files["plain"]), tmp_path / "a")
    flips = data(files["plain"], train_augmentations=Compose([RandomHorizontalFlip(), ColorJitter(0.5)]))
    others, _ = run(build("Yardstick"), flips, tmp_path / "b")
    torch.testing.assert_close(learned, others, rtol=0, atol=1e-6)


def test_a_transform_that_has_random_in_its_name_alone_is_taken(files: dict[str, Path], tmp_path: Path) -> None:
    run(build("Yardstick"), data(files["plain"], augmentations=RandomAutocontrast(p=1.0)), tmp_path)


@pytest.mark.parametrize("kind", ["InTra", "PatchSVDD"])
def test_one_channel_is_refused_in_one_sentence(kind: str) -> None:
    with pytest.raises(ValueError, match=r"leaves 1 of 3 channels.*num_output_channels=3"):
        build(kind, pre_processor=PreProcessor(Compose([Resize((SIDE, SIDE)), Grayscale()])))
    build(kind, pre_processor=PreProcessor(Compose([Resize((SIDE, SIDE)), Grayscale(3)])))


def test_images_of_another_size_are_refused_in_a_test_too(files: dict[str, Path], tmp_path: Path) -> None:
    model = build("InTra", pre_processor=False)
    run(model, data(files["plain"]), tmp_path)
    for kind in ("test", "predict", "validate"):
        with pytest.raises(ValueError, match=r"192 x 192 pixels.*image_size is 128 x 128"):
            getattr(tiny_engine(tmp_path), kind)(model, datamodule=data(files["framed"]))


def test_other_augmentations_than_those_of_the_calibration_are_said(
    files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build("Yardstick")
    cropped = data(files["framed"], augmentations=CenterCrop(SIDE))
    engine = tiny_engine(tmp_path, logger=False)
    engine.test(model, datamodule=cropped)
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = Yardstick.load_from_checkpoint(tmp_path / "model.ckpt", visualizer=False)

    def said(does: str, **kwargs: object) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            getattr(tiny_engine(tmp_path, logger=False), does)(loaded, **kwargs)
        return [record.message for record in caplog.records if "augmentations" in record.message]

    assert not said("test", datamodule=cropped)
    assert "went through CenterCrop(size=(128, 128)), but these go through none" in said(
        "test", datamodule=data(files["plain"])
    )[0].replace("size=[128, 128]", "size=(128, 128)")
    assert "but these go through none" in said("predict", data_path=files["framed"] / "weave/test/hole")[0]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        loaded.to_torch(tmp_path)
    assert any("which an exported model does not have" in record.message for record in caplog.records)


def test_a_transform_that_a_checkpoint_cannot_hold_must_be_given_again(files: dict[str, Path], tmp_path: Path) -> None:
    _, seen = run(build("InTra", pre_processor=PreProcessor(Pad(16))), data(files["small"]), tmp_path)
    checkpoint = tmp_path / "InTra/MVTecAD/weave/v0/weights/lightning/model.ckpt"
    with pytest.raises(ValueError, match=r"a checkpoint cannot hold.*Pad\("):
        InTra.load_from_checkpoint(checkpoint)
    again, now = build("InTra", pre_processor=PreProcessor(Pad(16))), Seen()
    tiny_engine(tmp_path, callbacks=[now], logger=False).test(
        again, datamodule=data(files["small"]), ckpt_path=checkpoint
    )
    assert now.scores == pytest.approx(seen.scores, abs=1e-6)
    shutil.rmtree(tmp_path / "InTra")


class Validated(Callback):
    """Writes down what a validation sees."""

    def __init__(self) -> None:
        self.images: list[torch.Tensor] = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: CalibratedModule, outputs: object, *_: object
    ) -> None:
        self.images.append(torch.as_tensor(outputs.image).clone())


def test_a_model_without_one_takes_the_pre_processor_of_its_checkpoint_and_another_is_refused(
    files: dict[str, Path], tmp_path: Path
) -> None:
    def model(*transforms: Transform) -> CalibratedModule:
        return build(
            "OnePassInTra", 64, **({"pre_processor": PreProcessor(Compose([*transforms]))} if transforms else {})
        )

    def engine(epochs: int, *callbacks: Callback) -> Engine:
        return tiny_engine(tmp_path, max_epochs=epochs, logger=False, callbacks=list(callbacks))

    cropped = (CenterCrop(SIDE), Resize((64, 64)))
    seen, validated = Seen(), Validated()
    first = engine(1, seen, validated)
    first.train(model(*cropped), datamodule=data(files["framed"]))
    checkpoint = Path(first.best_model_path)
    for given in ((), cropped):
        now = Seen()
        engine(1, now).test(model(*given), datamodule=data(files["framed"]), ckpt_path=checkpoint)
        assert now.scores == pytest.approx(seen.scores, abs=1e-6)
        for name, image in seen.images.items():
            torch.testing.assert_close(now.images[name], image)
        resumed = Validated()
        last = checkpoint.with_name("last.ckpt")
        engine(2, resumed).fit(model(*given), datamodule=data(files["framed"]), ckpt_path=last)
        for image, before in zip(resumed.images, validated.images, strict=True):
            torch.testing.assert_close(image, before)
    with pytest.raises(ValueError, match=r"made with another pre-processor \(CenterCrop.*; here Resize.*: leave"):
        engine(1).test(model(Resize((64, 64))), datamodule=data(files["framed"]), ckpt_path=checkpoint)
    assert OnePassInTra.load_from_checkpoint(checkpoint, pre_processor=PreProcessor(Compose([*cropped]))).is_calibrated


def test_a_model_that_was_resumed_knows_what_it_was_calibrated_through(files: dict[str, Path], tmp_path: Path) -> None:
    cropped = data(files["framed"], augmentations=CenterCrop(64))
    first = tiny_engine(tmp_path, max_epochs=1, logger=False)
    first.fit(build("OnePassInTra", 64), datamodule=cropped)
    model = build("OnePassInTra", 64)
    last = Path(first.best_model_path).with_name("last.ckpt")
    tiny_engine(tmp_path, max_epochs=2, logger=False).train(model, datamodule=cropped, ckpt_path=last)
    assert model.calibrated_through == "CenterCrop(size=(64, 64))"
    assert model._seconds > torch.load(last, weights_only=True)["seconds_trained"]


@pytest.mark.parametrize("seed", [0, 1])
def test_thresholds_from_images_that_may_have_been_learned_from_are_spoken_of(
    files: dict[str, Path], tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    engine = tiny_engine(tmp_path, max_epochs=1, logger=False)
    engine.fit(build("InTra"), datamodule=data(files["plain"]))
    loaded = InTra.load_from_checkpoint(
        engine.best_model_path, post_processor=InTraPostProcessor(image_quantile=0.5), visualizer=False
    )
    caplog.clear()
    datamodule = MVTecAD(files["plain"], "weave", num_workers=0, seed=seed, val_split_mode="from_train")
    tiny_engine(tmp_path, logger=False).test(loaded, datamodule=datamodule)
    assert ("holds out other images than in the training of this model" in caplog.text) == (seed == 1)
