# SPDX-License-Identifier: Apache-2.0
"""Image files as they come: damaged, of other depths and colours, turned, tiny, huge, with odd names."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import Folder, ImageBatch, PredictDataset
from anomalib.data.datasets.image.folder import FolderDataset
from anomalib.data.utils import read_image, read_mask
from lightning.pytorch import seed_everything
from PIL import Image, JpegImagePlugin, PngImagePlugin
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2 import CenterCrop

from anomalib_intra import InTra, MVTec, TextureDemo, cli
from anomalib_intra.components.batch import InTraBatch
from anomalib_intra.data.image_files import check_image_files, masks_of_files

from ..conftest import Run, tiny_engine, tiny_intra
from ..readme import blocks_of


def picture(height: int = 64, width: int = 64, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def check(path: Path) -> None:
    check_image_files(DataLoader(PredictDataset(path)))


@pytest.fixture(scope="module")
def model() -> InTra:
    """A model that can score, as if it had been trained."""
    seed_everything(0)
    model = tiny_intra(visualizer=True)
    model.post_processor.set_training_mean(torch.zeros(1, 1, 64, 64))
    model.post_processor._image_threshold.fill_(0.1)
    model.post_processor._pixel_threshold.fill_(0.1)
    return model


def predict(model: InTra, path: Path, results: Path) -> ImageBatch:
    (batch,) = tiny_engine(results).predict(model, data_path=path)
    assert torch.isfinite(batch.pred_score).all()
    assert torch.isfinite(batch.anomaly_map).all()
    return batch


# ---- damaged files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tiff", ".webp"])
@pytest.mark.parametrize("left", [0.0, 0.01, 0.5, 0.99])
def test_truncated_and_empty_files_are_refused_by_name(tmp_path: Path, suffix: str, left: float) -> None:
    picture().save(tmp_path / f"whole{suffix}")
    check(tmp_path)
    content = (tmp_path / f"whole{suffix}").read_bytes()
    (tmp_path / f"cut{suffix}").write_bytes(content[: int(left * len(content))])
    wrong = "is empty" if left == 0 else "is damaged or no image"
    with pytest.raises(ValueError, match=rf"^1 of 2 image files .*cut\{suffix} {wrong}.*copy it again"):
        check(tmp_path)


@pytest.mark.parametrize("cut", [1, 2, 4, 8, 12, 16])
def test_files_that_lack_only_their_last_bytes_are_refused(tmp_path: Path, cut: int) -> None:
    picture().save(tmp_path / "cut.jpg")
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[:-cut])
    with pytest.raises(ValueError, match=r"cut\.jpg is damaged"):
        check(tmp_path)


def test_png_with_one_wrong_bit_is_refused(tmp_path: Path) -> None:
    picture().save(tmp_path / "flipped.png")
    content = bytearray((tmp_path / "flipped.png").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"flipped\.png is damaged"):
        check(tmp_path)


def test_jpeg_with_something_behind_its_end_is_accepted(tmp_path: Path) -> None:
    picture().save(tmp_path / "padded.jpg")
    with (tmp_path / "padded.jpg").open("ab") as file:
        file.write(bytes(1000))
    check(tmp_path)


def test_text_file_named_png_is_refused(tmp_path: Path) -> None:
    (tmp_path / "fake.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"fake\.png is damaged or no image \(cannot identify image file"):
        check(tmp_path)


def test_error_counts_all_unusable_files_and_names_the_first_five(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"{number}.png").touch()
    picture().save(tmp_path / "good.png")
    with pytest.raises(ValueError, match=r"^7 of 8 image files") as error:
        check(tmp_path)
    assert [f"{number}.png is empty" in str(error.value) for number in range(7)] == [True] * 5 + [False] * 2


def test_images_beyond_the_limit_of_pil_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture().save(tmp_path / "vast.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    with pytest.raises(ValueError, match=r"vast\.png is too large .*make it smaller"):
        check(tmp_path)


def test_whole_png_and_jpeg_files_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(self: Image.Image) -> None:
        raise AssertionError("decoded")

    for plugin in (PngImagePlugin.PngImageFile, JpegImagePlugin.JpegImageFile):
        monkeypatch.setattr(plugin, "load", decode)
    for name in ("a.png", "b.jpg"):
        picture().save(tmp_path / name)
    check(tmp_path)


# ---- extensions ------------------------------------------------------------------------------------------------------


def test_wrong_extension_of_an_image_does_not_matter(model: InTra, tmp_path: Path) -> None:
    picture().save(tmp_path / "right.png")
    (tmp_path / "wrong.jpg").write_bytes((tmp_path / "right.png").read_bytes())
    right, wrong = (predict(model, tmp_path / name, tmp_path / "r") for name in ("right.png", "wrong.jpg"))
    assert torch.equal(right.pred_score, wrong.pred_score)


def test_file_with_the_extension_of_no_image_is_refused(model: InTra, tmp_path: Path) -> None:
    picture().save(tmp_path / "part.dat", format="PNG")
    with pytest.raises(ValueError, match=r"not an image file: .*part\.dat"):
        tiny_engine(tmp_path / "r").predict(model, data_path=tmp_path / "part.dat")


# ---- depth and colour ------------------------------------------------------------------------------------------------

RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (RAMP.astype(np.uint16), "sixteen.png"),
        (RAMP.astype(np.uint16), "sixteen.tiff"),
        (RAMP.astype(np.int32), "thirty_two.tiff"),
        ((RAMP / 65535).astype(np.float32), "float.tiff"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_grey_files_of_more_than_8_bits_are_refused(tmp_path: Path, values: np.ndarray, name: str) -> None:
    Image.fromarray(values).save(tmp_path / name)
    clipped = read_image(tmp_path / name)
    assert clipped.mean() > 0.98 or clipped.mean() < 0.02  # what would have been seen: white, or black
    with pytest.raises(ValueError, match=rf"{re.escape(name)} has values of more than 8 bits .*scale them to 8 bits"):
        check(tmp_path)


def test_16_bits_per_colour_are_read_by_their_upper_8(tmp_path: Path) -> None:
    values = np.dstack([RAMP, RAMP[::-1], RAMP.T]).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "colour.png"), values[..., ::-1])
    check(tmp_path)
    assert np.abs(read_image(tmp_path / "colour.png") - values / 65535).max() < 1 / 255


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize(("white", "is_dark"), [(4095, True), (65535, False)])
def test_12_bits_in_16_per_colour_are_called_dark(
    tmp_path: Path, suffix: str, white: int, is_dark: bool, caplog: pytest.LogCaptureFixture
) -> None:
    values = np.repeat(RAMP[..., None] * white / 65535, 3, axis=2).astype(np.uint16)
    cv2.imwrite(str(tmp_path / f"deep{suffix}"), values)
    picture().save(tmp_path / "plain.png")
    check(tmp_path)
    said = f"1 of 2 images have 16 bits per colour, of which the upper 8 are read, and of {tmp_path / f'deep{suffix}'}"
    assert (f"{said} the brightest is then 15 of 255" in caplog.text) == is_dark
    assert len(caplog.messages) == is_dark


def test_what_the_guide_does_with_16_bits_keeps_their_order(tmp_path: Path) -> None:
    """By one white level for all images, which is what a dark one needs to stay dark."""
    page = (Path(__file__).parents[2] / "docs/guide/input.md").read_text(encoding="utf-8")
    (program,) = [block for language, block in blocks_of(page) if language == "python"]
    (tmp_path / "raw").mkdir()
    Image.fromarray((RAMP * 4095 / 65535).astype(np.uint16)).save(tmp_path / "raw/bright.png")
    Image.fromarray((RAMP * 2047 / 65535).astype(np.uint16)).save(tmp_path / "raw/dark.png")
    colour = np.stack([RAMP * 4095 / 65535, np.zeros_like(RAMP), np.zeros_like(RAMP)], axis=2).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "raw/colour.png"), colour[..., ::-1])  # red alone
    for given, here in {"raw": tmp_path / "raw", "my_parts/good": tmp_path / "good"}.items():
        assert f'"{given}"' in program
        program = program.replace(f'"{given}"', repr(str(here)))
    exec(program, {})
    check(tmp_path / "good")
    for name, brightest in {"bright": 1.0, "dark": 0.5, "colour": 1.0}.items():
        expected = RAMP / 65535 * brightest
        assert np.abs(read_image(tmp_path / f"good/{name}.png")[..., 0] - expected).max() < 1 / 255


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_other_colours_are_turned_into_rgb(
    model: InTra, tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    image = picture().convert(mode)
    name = "part.jpg" if mode == "CMYK" else "part.png"
    image.save(tmp_path / name)
    with Image.open(tmp_path / name) as stored:
        assert stored.mode == mode
        stored.convert("RGB").save(tmp_path / "rgb.png")
    given, rgb = (predict(model, tmp_path / which, tmp_path / "r") for which in (name, "rgb.png"))
    assert torch.equal(given.image, rgb.image)
    assert torch.equal(given.pred_score, rgb.pred_score)
    if mode != "P":  # a palette of 256 of the colours
        difference = np.abs(read_image(tmp_path / "rgb.png") - np.array(image.convert("RGB")) / 255)
        assert difference.mean() < 0.1
    assert "alpha" not in caplog.text


def test_alpha_is_ignored_with_one_warning(model: InTra, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "parts").mkdir()
    for number in range(3):
        image = picture(seed=number)
        image.save(tmp_path / f"{number}.png")
        image.putalpha(Image.linear_gradient("L").resize((64, 64)))
        image.save(tmp_path / "parts" / f"{number}.png")
    batches = tiny_engine(tmp_path / "r").predict(model, data_path=tmp_path / "parts")
    for number, batch in enumerate(batches):
        opaque = predict(model, tmp_path / f"{number}.png", tmp_path / "r")
        assert torch.equal(batch.pred_score, opaque.pred_score)
    (warning,) = (record.getMessage() for record in caplog.records if "alpha" in record.getMessage())
    assert "3 of 3 images" in warning
    assert "0.png" in warning


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_exif_orientation_is_ignored_with_a_warning(
    model: InTra, tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = picture(64, 96)
    image.save(tmp_path / f"turned{suffix}", exif=exif, quality=95)
    image.save(tmp_path / f"plain{suffix}", quality=95)
    turned, plain = (predict(model, tmp_path / f"{name}{suffix}", tmp_path / "r") for name in ("turned", "plain"))
    assert torch.equal(turned.pred_score, plain.pred_score)
    (warning,) = (record.getMessage() for record in caplog.records if "EXIF" in record.getMessage())
    assert f"turned{suffix}" in warning
    assert "exif_transpose" in warning


def test_orientation_of_tiff_files_is_followed_by_pil_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(64, 96).save(tmp_path / "turned.tiff", exif=exif)
    check(tmp_path)
    assert read_image(tmp_path / "turned.tiff").shape == (96, 64, 3)
    assert "EXIF" not in caplog.text


# ---- files of which only a part is read, or nothing ------------------------------------------------------------------


def test_pages_of_a_tiff_after_the_first_are_missed_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picture().save(tmp_path / "one.tiff")
    check(tmp_path)
    assert not caplog.messages
    picture().save(tmp_path / "three.tiff", save_all=True, append_images=[picture(seed=1), picture(seed=2)])
    check(tmp_path)
    (warning,) = caplog.messages
    assert re.match(r"1 of 2 images have several pages, such as .*three\.tiff: only the first is read", warning)


def test_channels_of_a_tiff_that_are_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture().save(tmp_path / "three.tiff")
    Image.new("L", (64, 64)).save(tmp_path / "one.tiff")
    check(tmp_path)
    assert not caplog.messages
    rgbx = np.dstack([np.array(picture()), np.full((64, 64), 9, np.uint8)])
    Image.fromarray(rgbx, "RGBX").save(tmp_path / "four.tiff")
    check(tmp_path)
    (warning,) = caplog.messages
    assert re.match(r"1 of 3 images have channels that are not read, such as .*four\.tiff", warning)


def test_image_files_that_anomalib_passes_over_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(2):
        picture(seed=number).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "0.dng").touch()  # the same picture, as the camera keeps it beside
    check(tmp_path)
    assert not caplog.messages
    for name in ("2.jfif", "3.GIF"):
        (tmp_path / name).touch()
    check(tmp_path)
    (warning,) = caplog.messages
    assert re.match(r"2 files beside the images are passed over, such as .*2\.jfif: .*Save them as PNG", warning)


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ([(64, 64), (64, 70)], None),
        (
            [(64, 64), (128, 128), (64, 72)],
            r"Images differ in shape, such as .*0\.png \(64 x 64 .* and .*2\.png \(64 x 72\): ",
        ),
        ([(64, 96)], None),
        ([(64, 100)], r"Images of 64 x 100 pixels .* are squeezed to 64 x 64.* --model\.image_size '\[128, 1024\]'"),
        ([(100, 64)], r"Images of 100 x 64 pixels"),
    ],
    ids=str,
)
def test_shapes_that_are_squeezed_are_named(
    model: InTra, tmp_path: Path, sizes: list[tuple[int, int]], said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    for number, size in enumerate(sizes):
        picture(*size).save(tmp_path / f"{number}.png")
    tiny_engine(tmp_path / "r").predict(model, data_path=tmp_path)
    of_shapes = [message for message in caplog.messages if "squeezed" in message]
    assert len(of_shapes) == bool(said)
    assert not said or re.match(said, of_shapes[0])


@pytest.mark.parametrize(("size", "is_said"), [((96, 64), True), ((128, 128), False), ((64, 68), False)])
def test_images_of_another_shape_than_those_of_the_training_are_named(
    trained_intra: Run, tmp_path: Path, size: tuple[int, int], is_said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        picture(*size, seed=number).save(tmp_path / f"{number}.png")
    model = InTra.load_from_checkpoint(trained_intra.checkpoint, visualizer=False)
    tiny_engine(tmp_path / "r").predict(model, data_path=tmp_path)
    words = "another shape (such as %d x %d pixels, height x width) than those of the training (128 x 128)"
    assert (words % size in caplog.text) == is_said == ("another shape" in caplog.text)


def test_shapes_that_the_datamodule_crops_are_not_spoken_of(
    model: InTra, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, width in enumerate((64, 200)):
        picture(64, width).save(tmp_path / f"{number}.png")
    dataset = PredictDataset(tmp_path, transform=CenterCrop(64))
    loader = DataLoader(dataset, collate_fn=dataset.collate_fn)
    tiny_engine(tmp_path / "r").predict(model, dataloaders=loader)
    assert "squeezed" not in caplog.text


@pytest.mark.parametrize(
    ("turned", "width", "proposed"), [(False, 96, []), (True, 96, ["64, 96"]), (True, 90, ["64, 96"])]
)
def test_shapes_that_are_squeezed_and_then_turned_in_training_are_named_with_a_size_that_fits_all_models(
    tmp_path: Path, turned: bool, width: int, proposed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_intra(augment=turned, windows_per_image=1)
    engine = tiny_engine(tmp_path / "r", max_steps=1, logger=False)
    engine.fit(model, datamodule=parts(tmp_path, (64, width), (64, width)))
    engine.predict(model, data_path=tmp_path / "normal")
    of_shapes = [message for message in caplog.messages if "squeezed" in message]
    of_size = rf"64 x {width} .* 64 x 64 and turned.* '\[(.*)\]'"
    assert [size for message in of_shapes for size in re.findall(of_size, message)] == proposed
    assert len(of_shapes) == len(proposed)


@pytest.mark.parametrize(("height", "width"), [(100, 1), (1, 100), (1, 1)])
def test_images_1_pixel_wide_or_high_are_scored(model: InTra, tmp_path: Path, height: int, width: int) -> None:
    picture(height, width).save(tmp_path / "thin.png")
    assert predict(model, tmp_path / "thin.png", tmp_path / "r").anomaly_map.shape == (1, 64, 64)


def test_image_of_10000_x_10000_pixels_is_scored_in_bounded_memory(tmp_path: Path) -> None:
    """100 million pixels are 1.2 GB as float32 RGB; two copies of that are there at the peak, and never a third."""
    Image.new("L", (10_000, 10_000), 90).save(tmp_path / "huge.png")
    program = f"""
import resource, torch
from tests.conftest import tiny_engine, tiny_intra
model = tiny_intra(visualizer=False)
model.post_processor.set_training_mean(torch.zeros(1, 1, 64, 64))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(batch,) = tiny_engine({str(tmp_path / "r")!r}).predict(model, data_path={str(tmp_path / "huge.png")!r})
assert batch.image.shape == (1, 3, 64, 64)
print("grew by", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, "KiB")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False, cwd=Path.cwd()
    )
    grown = re.search(r"grew by (\d+) KiB", done.stdout)
    assert grown, done.stderr
    assert int(grown[1]) * 1024 < 2.5 * (3 * 10_000**2 * 4)


# ---- masks -----------------------------------------------------------------------------------------------------------


def parts(root: Path, mask_size: tuple[int, int], image_size: tuple[int, int] = (64, 96)) -> Folder:
    """Six normal and two anomalous images with a mask of their upper left quarter."""
    for folder in ("normal", "broken", "masks"):
        (root / folder).mkdir(parents=True)
    for number in range(6):
        picture(*image_size, seed=number).save(root / "normal" / f"{number}.png")
    for number in range(2):
        picture(*image_size, seed=9 + number).save(root / "broken" / f"{number}.png")
        mask = np.zeros(mask_size, dtype=np.uint8)
        mask[: (mask_size[0] + 1) // 2, : (mask_size[1] + 1) // 2] = 255
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    return Folder(
        name="parts",
        root=root,
        normal_dir="normal",
        abnormal_dir="broken",
        mask_dir="masks",
        normal_split_ratio=0.34,
        val_split_mode="none",
        num_workers=0,
    )


@pytest.mark.parametrize("original_size", [False, True])
def test_masks_of_another_size_than_their_image_are_refused(
    model: InTra, tmp_path: Path, original_size: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.post_processor, "original_size", original_size)
    tiny_engine(tmp_path / "r").test(model, datamodule=parts(tmp_path / "right", (64, 96)))
    with pytest.raises(ValueError, match=r"0\.png is a mask of 96 x 64 pixels .* image of 64 x 96") as error:
        tiny_engine(tmp_path / "r").test(model, datamodule=parts(tmp_path / "wrong", (96, 64)))
    assert "give both the same size" in str(error.value)


def test_masks_1_pixel_wide_are_refused(model: InTra, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"0\.png is a mask 1 pixel wide or high"):
        tiny_engine(tmp_path / "r").test(model, datamodule=parts(tmp_path / "thin", (64, 1), (64, 1)))


FROM_MIDDLE = np.hypot(*(np.mgrid[:64, :64] - 32))


@pytest.mark.parametrize(
    ("name", "values", "is_grey"),
    [
        ("spot.png", 255 * (FROM_MIDDLE < 15), False),
        ("kinds.png", (3 - FROM_MIDDLE // 8).clip(0), False),
        ("smooth.png", (20 - FROM_MIDDLE).clip(0, 10) * 25.5, True),
        ("spot.jpg", 255 * (FROM_MIDDLE < 15), True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_masks_in_shades_of_grey_are_named(
    tmp_path: Path, name: str, values: np.ndarray, is_grey: bool, caplog: pytest.LogCaptureFixture
) -> None:
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / name)
    counted = np.asarray(read_mask(tmp_path / name))
    for number in range(2):
        picture().save(tmp_path / f"{number}.png")
    dataset = FolderDataset("parts", normal_dir=tmp_path)
    dataset.samples["label_index"], dataset.samples["mask_path"] = 1, str(tmp_path / name)
    check_image_files(DataLoader(dataset))
    found = [re.search(rf"shades of grey.*: (\d+) of .*{name}, of which (\d+) are lighter", x) for x in caplog.messages]
    expected = [[(counted > 0).sum(), (counted > 127).sum()]] if is_grey else []
    assert [[int(number) for number in match.groups()] for match in found if match] == expected


def test_masks_with_transparency_are_refused(model: InTra, tmp_path: Path) -> None:
    datamodule = parts(tmp_path, (64, 96))
    for mask in (tmp_path / "masks").iterdir():
        with Image.open(mask) as image:
            opaque = image.convert("RGBA")
        opaque.save(mask)
    tiny_engine(tmp_path / "r").test(model, datamodule=datamodule)
    opaque.putpixel((3, 3), (255, 255, 255, 0))
    opaque.save(tmp_path / "masks/1.png")
    with pytest.raises(ValueError, match=r"1\.png is a mask with transparency, which is not read"):
        tiny_engine(tmp_path / "r").test(model, datamodule=datamodule)


@pytest.mark.parametrize(("colour", "said"), [("white", "100% not black"), ("black", "all black"), (None, "")])
def test_masks_that_may_be_the_other_way_round_are_named(
    model: InTra, tmp_path: Path, colour: str | None, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    datamodule = parts(tmp_path, (64, 96))
    if colour:
        Image.new("L", (96, 64), colour).save(tmp_path / "masks/0.png")
    tiny_engine(tmp_path / "r").test(model, datamodule=datamodule)
    of_masks = [message for message in caplog.messages if "exchange the two if masks" in message]
    assert len(of_masks) == bool(said)
    assert all(f"0.png is {said}" in message for message in of_masks)


def test_more_or_fewer_masks_than_bad_images_are_counted_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts(tmp_path, (64, 96))
    Image.new("L", (96, 64)).save(tmp_path / "masks/2.png")
    folders = {"root": tmp_path, "normal_dir": "normal", "abnormal_dir": "broken", "mask_dir": "masks"}
    given = [f"--data.{name}={value}" for name, value in folders.items()]
    words = ["train", "--config", "own_images", *given, f"--default_root_dir={tmp_path / 'r'}"]
    monkeypatch.setattr(sys, "argv", ["anomalib-intra", *words, "--trainer.accelerator=cpu"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "mask_dir holds 3 masks for the 2 images of abnormal_dir" in capsys.readouterr().err.splitlines()[-1]


def test_original_size_joins_several_masks_of_an_image(tmp_path: Path) -> None:
    """As in MVTec LOCO, whose datamodule of anomalib 2.7 does not run with pandas 3."""
    images = [str(tmp_path / f"{number}.png") for number in range(3)]
    masks = []
    for number in range(3):
        mask = np.zeros((64, 96), dtype=np.uint8)
        mask[:, 8 * number] = 255
        masks.append(str(tmp_path / f"mask_{number}.png"))
        Image.fromarray(mask).save(masks[-1])
    samples = pd.DataFrame({"image_path": images, "mask_path": [masks[:2], masks[2], ""]})
    batch = InTraBatch(image=torch.rand(3, 3, 64, 64), anomaly_map=torch.rand(3, 64, 96), image_path=images)
    joined = masks_of_files(SimpleNamespace(samples=samples), batch.image_path, batch.anomaly_map.shape[-2:])
    assert joined.shape == (3, 64, 96)
    assert joined.sum(dim=(1, 2)).tolist() == [2 * 64, 64, 0]


# ---- folders and names -----------------------------------------------------------------------------------------------


def test_empty_folders_are_refused_by_name(model: InTra, tmp_path: Path) -> None:
    empty = tmp_path / "MVTecAD" / "bottle"
    (empty / "train" / "good").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"Found 0 images in {empty}"):
        tiny_engine(tmp_path / "r").predict(model, data_path=empty)
    with pytest.raises(RuntimeError, match=f"Found 0 images in {empty}"):
        tiny_engine(tmp_path / "r").fit(tiny_intra(), datamodule=MVTec(tmp_path / "MVTecAD", num_workers=0))
    with pytest.raises(RuntimeError, match=f"Found 0 .* images in {empty}"):
        tiny_engine(tmp_path / "r").fit(tiny_intra(), datamodule=Folder("parts", empty, root=tmp_path))
    (empty / "test" / "good").mkdir(parents=True)
    picture().save(empty / "test" / "good" / "000.png")
    with pytest.raises(ValueError, match=r"at least 2 normal training images.*found 0"):
        tiny_engine(tmp_path / "r").fit(tiny_intra(), datamodule=MVTec(tmp_path / "MVTecAD", num_workers=0))


@pytest.mark.parametrize("name", ["Prüfung 検査 🔩", "x" * 200 + "/" + "y" * 200 + "/" + "z" * 200])
def test_data_sets_at_odd_and_very_long_paths_are_refused_and_work_from_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    root = tmp_path / name
    root.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"at most 512 ASCII characters, not from .*relative to the working directory"):
        TextureDemo(root)
    monkeypatch.chdir(root)
    datamodule = TextureDemo("demo", num_workers=0)
    tiny_engine(tmp_path / "r").train(tiny_intra(windows_per_image=1, visualizer=True), datamodule=datamodule)
    assert len(list((tmp_path / "r").rglob("images/test/*/*.png"))) == 52


@pytest.mark.parametrize("name", ["größe 検査 🔩.png", "x" * 250 + ".png"])
def test_images_with_odd_and_very_long_names_are_scored_and_drawn(model: InTra, tmp_path: Path, name: str) -> None:
    (tmp_path / "parts").mkdir()
    picture().save(tmp_path / "parts" / name)
    batch = predict(model, tmp_path / "parts", tmp_path / "r")
    assert Path(batch.image_path[0]).name == name
    assert [path.name for path in (tmp_path / "r").rglob("*.png")] == [name]


def test_prediction_from_odd_paths_is_refused_by_anomalib_and_works_from_within(
    model: InTra, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "Prüfung"
    folder.mkdir()
    picture().save(folder / "größe.png")
    with pytest.raises(ValueError, match="Prüfung"):
        tiny_engine(tmp_path / "r").predict(model, data_path=folder)
    monkeypatch.chdir(folder)
    predict(model, Path(), tmp_path / "r")


def test_folders_at_odd_paths_are_refused_and_work_by_whole_paths_through_a_link(
    model: InTra, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "Prüfung").mkdir()
    for kind in ("good", "bad"):
        (tmp_path / "Prüfung" / kind).mkdir()
        for number in range(10):
            picture(seed=number).save(tmp_path / "Prüfung" / kind / f"{number}.png")
    link = tmp_path / "parts"
    link.symlink_to(tmp_path / "Prüfung")
    whole = [f"--data.{name}_dir={link / kind}" for name, kind in {"normal": "good", "abnormal": "bad"}.items()]
    small = ("image_size=[64,64]", "embed_dim=32", "depth=1", "num_heads=2", "minutes=0.001", "visualizer=false")
    words = ["train", "--config", "own_images", *(f"--model.{one}" for one in small), "--data.num_workers=0"]
    results = [
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--default_root_dir={tmp_path / 'r'}",
    ]
    monkeypatch.setattr(sys, "argv", ["anomalib-intra", *words, *results, "--data.root", str(link)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.match(
        r"anomalib-intra: Path contains non-printable .*/Prüfung/\w+\. .*--data\.normal_dir /LINK/good", said
    )

    monkeypatch.setattr(sys, "argv", ["anomalib-intra", *words, *results, *whole])
    cli.main()
    assert list((tmp_path / "r").rglob("model.ckpt"))
    assert len(tiny_engine(tmp_path / "p").predict(model, data_path=link / "good")) == 10


# ---- where it is looked ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("call", ["fit", "validate", "test", "predict"])
def test_every_run_refuses_the_files_it_would_read(
    model: InTra, tmp_path: Path, call: str, split: str, caplog: pytest.LogCaptureFixture
) -> None:
    datamodule = TextureDemo(tmp_path / "demo", num_workers=0, val_split_mode="from_train")
    datamodule.prepare_data()
    Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / "demo/weave" / split / "good/000.png")
    engine = tiny_engine(tmp_path / "r", max_epochs=1, limit_train_batches=1, logger=False)
    read = {"fit": "train", "test": "test", "predict": "test", "validate": "train"}[call]
    if call == "validate":
        datamodule.val_split_mode = "same_as_test"
        read = "test"
    run = getattr(engine, call)
    subject = tiny_intra(windows_per_image=1) if call == "fit" else model
    if split == read:
        with pytest.raises(ValueError, match=r"000\.png has values of more than 8 bits"):
            run(subject, datamodule=datamodule)
    else:
        run(subject, datamodule=datamodule)
    # A training cannot know whether a test will follow; it says what that would refuse.
    warned = [message for message in caplog.messages if "the test will refuse them" in message]
    assert len(warned) == (call == "fit" and split == "test")
    assert all(re.match(r"1 of 52 test images cannot be used: .*000\.png has values of more", one) for one in warned)


def test_only_the_images_of_a_subset_are_looked_at(tmp_path: Path) -> None:
    for number in range(3):
        picture(seed=number).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"")
    dataset = PredictDataset(tmp_path)
    check_image_files([DataLoader(Subset(dataset, [0, 2])), DataLoader(dataset.image_filenames), None])
    with pytest.raises(ValueError, match=r"1 of 2 image files .*1\.png is empty"):
        check_image_files(DataLoader(Subset(dataset, [0, 1])))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_tensors_that_are_not_finite_are_refused_in_a_run(model: InTra, tmp_path: Path, value: float) -> None:
    images = torch.rand(2, 3, 64, 64)
    images[1, 2, 63, 0] = value
    loader = DataLoader([ImageBatch(image=images)], batch_size=None)
    with pytest.raises(ValueError, match="NaN or infinite values"):
        tiny_engine(tmp_path).predict(model, dataloaders=loader)
