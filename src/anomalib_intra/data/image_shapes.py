# SPDX-License-Identifier: Apache-2.0
"""Shapes of image files: a resize squeezes those that differ, and then equal parts look different to a model."""

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

logger = logging.getLogger(__name__)

#: By how much the shapes of images may differ from each other, and from that of the model, before a warning.
_SHAPES_DIFFER, _SHAPE_OF_MODEL_DIFFERS = 1.1, 1.5

#: Sizes that are proposed are multiples of this, which all models take.
_STEP = 16

#: Files of which the usual size is found out.
_LOOKED_AT = 20


class FileSize(NamedTuple):
    """An image file, and its height and width in pixels."""

    path: str
    height: int
    width: int

    @property
    def shape(self) -> float:
        """Width by height."""
        return self.width / self.height


def usual_size(paths: Sequence[str]) -> tuple[int, int] | None:
    """Find out how large image files are, by some of them.

    Args:
        paths (Sequence[str]): The files.

    Returns:
        tuple[int, int] | None: Height and width of the one whose shape is in the middle; None without files.
    """
    files = []
    for path in paths[:: math.ceil(len(paths) / _LOOKED_AT) or 1]:
        with Image.open(path) as image:
            files.append(FileSize(path, image.height, image.width))
    if not files:
        return None
    middle = sorted(files, key=lambda file: file.shape)[len(files) // 2]
    return middle.height, middle.width


def warn_of_other_shape(size: tuple[int, int] | None, trained: tuple[int, int] | None) -> None:
    """Tell of images that a resize squeezes otherwise than those of the training.

    Args:
        size (tuple[int, int] | None): Height and width of the images, None if not known.
        trained (tuple[int, int] | None): Those of the training.

    Example:
        >>> warn_of_other_shape((480, 640), trained=(960, 1280))
    """
    if size is None or trained is None:
        return
    differ = size[0] / size[1] * trained[1] / trained[0]
    if max(differ, 1 / differ) > _SHAPES_DIFFER:
        logger.warning(
            "These images have another shape (such as %d x %d pixels, height x width) than those of the training (%d x "
            "%d), and are squeezed otherwise, so that equal parts look different: crop or pad them to that shape.",
            *size,
            *trained,
        )


def warn_of_shapes(files: Sequence[FileSize], height: int, width: int, turned: bool) -> None:
    """Tell of images that differ in shape from each other, or from what they are resized to.

    Args:
        files (Sequence[FileSize]): The images.
        height (int): Height to which they are resized.
        width (int): Width to which they are resized.
        turned (bool): Whether they are then turned, by a quarter or by any angle.

    Example:
        >>> warn_of_shapes([FileSize("part.png", 960, 1280)], 192, 256, turned=True)
    """
    if not files:
        return
    by_shape = sorted(files, key=lambda file: file.shape)
    tallest, widest = by_shape[0], by_shape[-1]
    if widest.shape > _SHAPES_DIFFER * tallest.shape:
        logger.warning(
            "Images differ in shape, such as %s (%d x %d pixels, height x width) and %s (%d x %d): each is squeezed to "
            "%d x %d, so that equal parts look different. Crop or pad all to one shape.",
            *tallest,
            *widest,
            height,
            width,
        )
        return
    _, *size = tallest
    differ = tallest.shape * height / width
    if turned and max(differ, 1 / differ) > _SHAPES_DIFFER:
        shorter = min(height, width) / min(size)
        logger.warning(
            "Images of %d x %d pixels (height x width) are squeezed to %d x %d and turned, which distorts parts as no "
            "camera does. Train with a size of about their shape, such as --model.image_size '[%d, %d]', or without "
            "turning them (rotate and augment, as far as the model has them, false).",
            *size,
            height,
            width,
            *(_STEP * max(1, round(side * shorter / _STEP)) for side in size),
        )
    elif max(differ, 1 / differ) > _SHAPE_OF_MODEL_DIFFERS:
        logger.warning(
            "Images of %d x %d pixels (height x width) are squeezed to %d x %d, in which small defects may be lost. "
            "Train with a size of about their shape, in multiples of the patch size, such as --model.image_size "
            "'[128, 1024]' for wide ones.",
            *size,
            height,
            width,
        )
