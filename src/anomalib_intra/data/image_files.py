# SPDX-License-Identifier: Apache-2.0
"""A look at the image files of a run before it reads them: some would be read wrongly without a word."""

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from anomalib.data import AnomalibDataset, PredictDataset
from anomalib.data.utils import LabelName, read_mask
from PIL import ExifTags, Image, TiffImagePlugin
from torch.utils.data import Subset

from anomalib_intra.data.image_shapes import FileSize, warn_of_shapes

logger = logging.getLogger(__name__)

#: Unusable files that an error names.
_NAMED = 5

#: What is read otherwise than it may be meant, and what to do about it.
_ODDITIES = {
    "alpha": "have an alpha channel, such as %s: it is ignored, so transparent pixels show the colour that is stored "
    "under them.",
    "turned": "have an EXIF orientation, such as %s: it is ignored, so they are read as stored. If not all images of "
    "this part are stored alike, turn them with PIL.ImageOps.exif_transpose first.",
    "pages": "have several pages, such as %s: only the first is read. Save each page that counts as a file of its own.",
    "channels": "have channels that are not read, such as %s: only grey, or red, green and blue are. Save what else "
    "counts as an image of its own.",
}

#: Endings of images that anomalib passes over.
_PASSED_OVER = (".jfif", ".jpe", ".jp2", ".gif", ".heic", ".avif", ".tga", ".dng")

#: Below this value of 255, an image of 16 bits per colour is taken for one of fewer bits.
_DARK = 64

#: A mask with more shades is no longer black and white, or a number for each kind of defect.
_MOST_SHADES = 8

#: Share of an image that a mask may mark before a warning.
_MOST_ANOMALOUS = 0.6

_TAG_OF_CHANNELS = 277

_END_OF_JPEG = b"\xff\xd9"


def check_image_files(loaders: Any, resized_to: tuple[int, int] | None = None, turned: bool = False) -> None:
    """Refuse the files of a run if some cannot be read, or would not be read as they are meant.

    anomalib reads images as 8-bit RGB, with the pixels as they are stored. Therefore

    - empty, damaged and truncated files and files that are no images are refused, before hours of training;
    - 16-bit grey, 32-bit and floating-point files are refused: they would be clipped, 16-bit ones to plain white. (Of
      16 bits per colour, the upper 8 are read, which is right.);
    - masks of another size than their image are refused: resized with it, they would lie beside the anomaly;
    - an alpha channel is ignored, with a warning: often it is opaque, and the colours are what the camera saw;
    - an EXIF orientation is ignored, with a warning. Images that are all stored alike are right as they are, and
      exported models read them the same way; only images that are not would have to be turned;
    - a warning tells of TIFF files of which only a part is read, of image files of other kinds beside those that are
      read, and of 16 bits per colour that are nearly black when read;
    - masks with transparency are refused: where it is, they would be read as any colour;
    - a warning tells of shapes that are squeezed to another, and of masks in shades of grey, all black or mostly white.

    Headers and checksums are read, about 1 ms a file; only formats without either (and JPEG files with something behind
    their end) are decoded, and the first mask.

    Args:
        loaders (Any): A DataLoader, or several, of an anomalib dataset, a PredictDataset or a Subset of one. Others
            are not looked at.
        resized_to (tuple[int, int] | None): Height and width to which whole images are resized; None where something
            else is done to them.
        turned (bool): Whether they are then turned, by a quarter or by any angle.

    Raises:
        ValueError: If there are unusable files.

    Example:
        >>> import tempfile
        >>> from torch.utils.data import DataLoader
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("I;16", (64, 64)).save(f"{folder}/part.png")
        ...     check_image_files(DataLoader(PredictDataset(folder)))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: 1 of 1 image files cannot be used: ...part.png has values of more than 8 bits...
    """
    loaders = loaders if isinstance(loaders, list) else [loaders]
    files = [file for loader in loaders for file in _files_of(getattr(loader, "dataset", None))]
    looks, problems = _look_at_all(files)
    if problems:
        raise ValueError(_in_one_sentence(problems, len(files), "image files"))
    for oddity, words in _ODDITIES.items():
        odd = [look.path for look in looks if oddity in look.oddities]
        if odd:
            logger.warning(f"%d of %d images {words}", len(odd), len(files), odd[0])
    _warn_of_dark_depths(looks)
    _warn_of_files_passed_over(looks)
    _warn_of_odd_masks([mask_path for _, mask_paths in files for mask_path in mask_paths])
    if resized_to is not None:
        warn_of_shapes([FileSize(look.path, *look.size[::-1]) for look in looks], *resized_to, turned)


def warn_of_test_images(dataset: Any) -> None:
    """Say when a training begins what the test after it would refuse, hours later.

    Args:
        dataset (Any): Images of the test.
    """
    files = list(_files_of(dataset))
    _, problems = _look_at_all(files)
    if problems:
        logger.warning(
            "%s Mend this before the training ends: the test will refuse them.",
            _in_one_sentence(problems, len(files), "test images"),
        )


def paths_of(dataset: Any) -> list[str]:
    """List the image files of a data set.

    Args:
        dataset (Any): An anomalib dataset, a PredictDataset or a Subset of one; of all others, no files are known.

    Returns:
        list[str]: Their paths.
    """
    return [path for path, _ in _files_of(dataset)]


def fingerprint(dataset: Any) -> str:
    """Tell image files from others by their names and sizes, wherever they lie.

    Args:
        dataset (Any): As for :func:`paths_of`.

    Returns:
        str: Hexadecimal digits.
    """
    paths = [Path(path) for path in paths_of(dataset)]
    return hashlib.sha256(repr(sorted((path.name, path.stat().st_size) for path in paths)).encode()).hexdigest()


def mask_files(mask_path: Any) -> list[str]:
    """List the files that make up the mask of an image.

    Args:
        mask_path (Any): Entry of the ``mask_path`` column of an anomalib dataset: a path, several, or something empty.

    Returns:
        list[str]: Their paths.

    Example:
        >>> mask_files("000_mask.png"), mask_files(["000.png", "001.png"]), mask_files(""), mask_files(None)
        (['000_mask.png'], ['000.png', '001.png'], [], [])
    """
    paths = mask_path if isinstance(mask_path, list) else [mask_path]
    return [path for path in paths if isinstance(path, str) and path]


def common_size(image_paths: list[str] | None) -> tuple[int, int]:
    """Tell the size of image files of which all have the same.

    Args:
        image_paths (list[str] | None): Their paths.

    Returns:
        tuple[int, int]: Height and width in pixels.

    Raises:
        ValueError: If there are no paths, or sizes differ.
    """
    if not image_paths:
        msg = "original_size=True needs the image files, and this batch has no image_path: set original_size=False."
        raise ValueError(msg)
    sizes = set()
    for path in image_paths:
        with Image.open(path) as image:
            sizes.add((image.height, image.width))
    if len(sizes) > 1:
        msg = (
            f"original_size=True needs images of one size in a batch, found {sorted(sizes)}: set eval_batch_size=1 on "
            "the datamodule, or original_size=False."
        )
        raise ValueError(msg)
    return sizes.pop()


def masks_of_files(dataset: Any, image_paths: list[str], size: tuple[int, int]) -> torch.Tensor:
    """Read the masks of images as their files hold them.

    Args:
        dataset (Any): The images' anomalib dataset.
        image_paths (list[str]): Paths of the images.
        size (tuple[int, int]): Height and width of the files in pixels.

    Returns:
        torch.Tensor: Masks of shape ``(B, H, W)``; zeros where an image has none.

    Raises:
        ValueError: If the dataset is of another kind.
    """
    if not hasattr(dataset, "samples"):
        msg = (
            f"original_size=True needs anomalib's dataset for the masks, not {type(dataset).__name__}: set it to False."
        )
        raise ValueError(msg)
    # Not the batch's mask_path: collating drops it where the first image of a batch is normal.
    mask_paths = dict(zip(dataset.samples.image_path, dataset.samples.mask_path, strict=True))
    masks = []
    for image_path in image_paths:
        mask = torch.zeros(size, dtype=torch.uint8)
        for path in mask_files(mask_paths[image_path]):
            mask |= torch.as_tensor(read_mask(path, as_tensor=True))
        masks.append(mask)
    return torch.stack(masks)


class _UnusableFileError(Exception):
    """Says of a file what is wrong with it and what to do about it."""


class _Look(NamedTuple):
    path: str
    size: tuple[int, int]
    mode: str
    is_deep: bool
    oddities: set[str]


def _files_of(dataset: Any) -> Iterator[tuple[str, list[str]]]:
    """Yield each image of a dataset with the masks that are read with it."""
    if isinstance(dataset, Subset):
        files = list(_files_of(dataset.dataset))
        yield from (files[index] for index in dataset.indices if files)
    elif isinstance(dataset, PredictDataset):
        yield from ((str(path), []) for path in dataset.image_filenames)
    elif isinstance(dataset, AnomalibDataset):
        for sample in dataset.samples.to_dict("records"):
            anomalous = sample.get("label_index") == LabelName.ABNORMAL
            yield sample["image_path"], mask_files(sample.get("mask_path")) if anomalous else []


def _look_at_all(files: list[tuple[str, list[str]]]) -> tuple[list[_Look], list[str]]:
    looks, problems = [], []
    for image_path, mask_paths in files:
        try:
            look = _look_at(image_path)
            _check_depth(look)
            _check_masks(look, mask_paths)
        except _UnusableFileError as problem:
            problems.append(str(problem))
        else:
            looks.append(look)
    return looks, problems


def _in_one_sentence(problems: list[str], count: int, what: str) -> str:
    end = "; ..." if len(problems) > _NAMED else "."
    return f"{len(problems)} of {count} {what} cannot be used: {'; '.join(problems[:_NAMED])}{end}"


def _look_at(path: str) -> _Look:
    try:
        if Path(path).stat().st_size == 0:
            msg = f"{path} is empty: copy it again, or delete it"
            raise _UnusableFileError(msg)
        with Image.open(path) as image:
            is_deep = image.format in ("PNG", "TIFF") and ";16" in str(image.tile)
            look = _Look(path, image.size, image.mode, is_deep, set(_oddities(image)))
            _check_whole(path, image)
    except _UnusableFileError:
        raise
    except Image.DecompressionBombError as error:
        msg = f"{path} is too large ({error}): make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS"
        raise _UnusableFileError(msg) from error
    except Exception as error:  # PIL raises all kinds on damaged files
        msg = f"{path} is damaged or no image ({error}): copy it again, or delete it"
        raise _UnusableFileError(msg) from error
    return look


def _oddities(image: Image.Image) -> Iterator[str]:
    if image.has_transparency_data:
        yield "alpha"
    if _orientation(image) != 1:
        yield "turned"
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        if image.n_frames > 1:
            yield "pages"
        if image.tag_v2.get(_TAG_OF_CHANNELS, 1) > len(image.getbands()):
            yield "channels"


def _orientation(image: Image.Image) -> int:
    # TIFF files are turned by PIL; in a PNG without it in front of the pixels, a search would decode these.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    return int(image.getexif().get(ExifTags.Base.Orientation, 1))


def _check_whole(path: str, image: Image.Image) -> None:
    if image.format == "PNG":
        image.verify()  # its checksums
    elif image.format != "JPEG" or not _ends_with(path, _END_OF_JPEG):
        image.load()


def _is_opaque(path: str) -> bool:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGBA"))[..., 3].min() == 255


def _ends_with(path: str, end: bytes) -> bool:
    with Path(path).open("rb") as file:
        file.seek(-len(end), os.SEEK_END)
        return file.read() == end


def _check_depth(image: _Look) -> None:
    if image.mode.startswith(("I", "F")):
        msg = (
            f"{image.path} has values of more than 8 bits (mode {image.mode}), which would be clipped to 0 to 255, "
            "mostly to white: scale them to 8 bits, all by one white level, as the guide on input shows; convert('L') "
            "would clip them, too"
        )
        raise _UnusableFileError(msg)


def _warn_of_dark_depths(looks: list[_Look]) -> None:
    deep = [look.path for look in looks if look.is_deep]
    if not deep:
        return
    with Image.open(deep[0]) as image:  # one tells of all: decoding takes long
        brightest = np.asarray(image.convert("RGB")).max()
    if brightest < _DARK:
        logger.warning(
            "%d of %d images have 16 bits per colour, of which the upper 8 are read, and of %s the brightest is then "
            "%d of 255. If the camera has fewer bits, scale all images to 8 bits by one white level.",
            len(deep),
            len(looks),
            deep[0],
            brightest,
        )


def _warn_of_files_passed_over(looks: list[_Look]) -> None:
    folders = {Path(look.path).parent for look in looks} if len(looks) > 1 else set()
    read = {Path(look.path).with_suffix("") for look in looks}  # (a camera's raw file may lie beside its JPEG)
    beside = sorted(x for folder in folders for x in folder.iterdir() if x.with_suffix("") not in read)
    passed_over = [x for x in beside if x.suffix.lower() in _PASSED_OVER]
    if passed_over:
        logger.warning(
            "%d files beside the images are passed over, such as %s: anomalib does not read such. Save them as PNG.",
            len(passed_over),
            passed_over[0],
        )


def _warn_of_odd_masks(mask_paths: list[str]) -> None:
    if not mask_paths:
        return
    with Image.open(mask_paths[0]) as image:  # one tells of all: decoding takes long
        shades = image.convert("L").histogram()
    anomalous = sum(shades[1:]) / sum(shades)
    if not 0 < anomalous <= _MOST_ANOMALOUS:
        logger.warning(
            "Masks are white where an image is anomalous, and black elsewhere, but %s is %s: exchange the two if masks "
            "are the other way round.",
            mask_paths[0],
            f"{anomalous:.0%} not black" if anomalous else "all black",
        )
    if sum(count > 0 for count in shades) > _MOST_SHADES:
        logger.warning(
            "Masks have shades of grey, as JPEG files and smooth edges do, and every pixel that is not black counts as "
            "anomalous: %d of %s, of which %d are lighter than mid-grey. Make masks black and white, such as with "
            "PIL's image.point(lambda value: 255 * (value > 127)), and save them as PNG.",
            sum(shades[1:]),
            mask_paths[0],
            sum(shades[128:]),
        )


def _check_masks(image: _Look, mask_paths: list[str]) -> None:
    for mask in map(_look_at, mask_paths):
        if mask.size != image.size:
            msg = (
                f"{mask.path} is a mask of {mask.size[1]} x {mask.size[0]} pixels (height x width) for an image of "
                f"{image.size[1]} x {image.size[0]}, {image.path}: give both the same size"
            )
            raise _UnusableFileError(msg)
        if "alpha" in mask.oddities and not _is_opaque(mask.path):
            msg = f"{mask.path} is a mask with transparency, which is not read: save it in black and white, without it"
            raise _UnusableFileError(msg)
        if 1 in mask.size:
            msg = f"{mask.path} is a mask 1 pixel wide or high, which anomalib cannot read: leave its image out"
            raise _UnusableFileError(msg)
