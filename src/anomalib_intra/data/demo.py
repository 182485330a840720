# SPDX-License-Identifier: Apache-2.0
"""A small data set in the MVTec AD layout, generated from a seed: two textures with defects and exact masks."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from einops import rearrange
from kornia.filters import gaussian_blur2d
from PIL import Image, ImageDraw

from anomalib_intra.data.mvtec import MVTec

logger = logging.getLogger(__name__)

_SIZE = 128
_NORMAL_TRAIN, _NORMAL_TEST, _PER_DEFECT = 60, 20, 8
_FORMAT = 1  # of the generated files; a folder of another format is generated anew

Defect = Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]


def weave(rng: np.random.Generator) -> np.ndarray:
    """Draw a plain weave, a periodic texture: shifted, lit and coloured a little differently every time.

    Args:
        rng (np.random.Generator): Source of randomness.

    Returns:
        np.ndarray: Image in [0, 1], shape ``(128, 128, 3)``.
    """
    period = 16
    y, x = np.mgrid[:_SIZE, :_SIZE] + rng.integers(0, 2, size=(2, 1, 1)) * period // 2
    warp, weft = np.sin(np.pi * x / (period / 2)) ** 2, np.sin(np.pi * y / (period / 2)) ** 2
    over = ((x // (period // 2)) + (y // (period // 2))) % 2 == 0
    height = np.where(over, 0.35 + 0.65 * warp, 0.25 + 0.5 * weft)
    colour = np.where(over[..., None], [0.80, 0.62, 0.40], [0.45, 0.50, 0.62])
    across, down = rng.uniform(-0.2, 0.2, 2)
    light = rng.uniform(0.7, 1.1) * (1 + across * (x / _SIZE - 0.5) + down * (y / _SIZE - 0.5))
    image = colour * (height * light)[..., None] + rng.normal(0, 0.015, (_SIZE, _SIZE, 1))
    return image.clip(0, 1)


def speckle(rng: np.random.Generator) -> np.ndarray:
    """Draw a random texture: grains on a soft ground, different in every place of every image.

    Args:
        rng (np.random.Generator): Source of randomness.

    Returns:
        np.ndarray: Image in [0, 1], shape ``(128, 128, 3)``.
    """

    def noise(sigma: float) -> np.ndarray:
        smooth = _blur(rng.normal(size=(_SIZE, _SIZE, 1)), sigma)[..., 0]
        return smooth / smooth.std()

    height = 0.5 + 0.05 * noise(6) + 0.05 * noise(1.5) + 0.01 * noise(0.5)
    return (height[..., None] * np.array([0.95, 1.0, 0.9])).clip(0, 1)


def _blob(rng: np.random.Generator, radius: tuple[float, float] = (7, 13)) -> np.ndarray:
    """A mask of an irregular round spot."""
    centre_y, centre_x = rng.uniform(24, _SIZE - 24, 2)
    y, x = np.mgrid[:_SIZE, :_SIZE]
    angle = np.arctan2(y - centre_y, x - centre_x)
    edge = rng.uniform(*radius) * (1 + 0.2 * np.sin(rng.integers(2, 5) * angle + rng.uniform(0, 6)))
    return np.hypot(y - centre_y, x - centre_x) < edge


def _stroke(rng: np.random.Generator, width: int) -> np.ndarray:
    """A mask of a bent stroke."""
    mask = Image.new("1", (_SIZE, _SIZE))
    start = rng.uniform(20, _SIZE - 20, 2)
    points = [start, *(start + np.cumsum(rng.uniform(12, 20, (3, 1)) * _directions(rng), axis=0))]
    ImageDraw.Draw(mask).line([tuple(np.clip(p, 4, _SIZE - 4)) for p in points], fill=1, width=width, joint="curve")
    return np.array(mask)


def _directions(rng: np.random.Generator) -> np.ndarray:
    angles = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.uniform(-0.6, 0.6, 3))
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur an image of shape (H, W, C), wrapping around its borders."""
    pixels = rearrange(torch.from_numpy(image), "h w c -> 1 c h w")
    kernel = 2 * int(4 * sigma) + 1
    blurred = gaussian_blur2d(pixels, kernel, (sigma, sigma), border_type="circular")
    return rearrange(blurred, "1 c h w -> h w c").numpy()


def _hole(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    mask = _blob(rng)
    return np.where(mask[..., None], 0.06 + 0.02 * rng.normal(size=image.shape), image), mask


def _scratch(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    mask = _stroke(rng, width=3)
    return np.where(mask[..., None], 0.92 + 0.03 * rng.normal(size=image.shape), image), mask


def _smear(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    mask = _blob(rng, radius=(10, 16))
    return np.where(mask[..., None], _blur(image, sigma=6), image), mask


def _displaced(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    mask = _blob(rng, radius=(10, 16))
    return np.where(mask[..., None], np.roll(image[::-1], (3, 5), axis=(0, 1)).swapaxes(0, 1), image), mask


def _fibre(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    mask = _stroke(rng, width=4)
    return np.where(mask[..., None], np.array([0.15, 0.2, 0.65]) + 0.03 * rng.normal(size=image.shape), image), mask


_TEXTURES: dict[str, tuple[Callable[[np.random.Generator], np.ndarray], dict[str, Defect]]] = {
    "weave": (weave, {"displaced": _displaced, "hole": _hole, "scratch": _scratch, "smear": _smear}),
    "speckle": (speckle, {"fibre": _fibre, "hole": _hole, "scratch": _scratch, "smear": _smear}),
}


def generate(root: Path, category: str, seed: int = 0) -> None:
    """Write a category in the layout of MVTec AD.

    Args:
        root (Path): Folder of the data set; the category gets a folder in it.
        category (str): ``"weave"`` (periodic) or ``"speckle"`` (random).
        seed (int): Seed of everything that is drawn.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     generate(Path(folder), "weave")
        ...     len(list(Path(folder).glob("weave/train/good/*.png")))
        60
    """
    draw, defects = _TEXTURES[category]
    rng = np.random.default_rng([seed, sorted(_TEXTURES).index(category)])
    # Another process may be generating the same.
    target, unfinished = root / category, root / f".{category}.{uuid4().hex}.unfinished"
    for split, count in (("train", _NORMAL_TRAIN), ("test", _NORMAL_TEST)):
        for n in range(count):
            _save(draw(rng), unfinished / split / "good" / f"{n:03}.png")
    for name, spoil in defects.items():
        for n in range(_PER_DEFECT):
            image, mask = spoil(draw(rng), rng)
            _save(image, unfinished / "test" / name / f"{n:03}.png")
            _save(mask, unfinished / "ground_truth" / name / f"{n:03}_mask.png")
    (unfinished / "demo.json").write_text(json.dumps({"format": _FORMAT, "seed": seed}), encoding="utf-8")
    if _is_made(target, seed):
        shutil.rmtree(unfinished)
        return
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)


def _is_made(folder: Path, seed: int) -> bool:
    made = folder / "demo.json"
    return made.is_file() and json.loads(made.read_text(encoding="utf-8")) == {"format": _FORMAT, "seed": seed}


def _save(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8)).save(path)


class TextureDemo(MVTec):
    """A generated data set to try things on: nothing is downloaded.

    ``weave`` is a periodic texture, ``speckle`` a random one, both of 128 x 128 pixels: 60 normal training images,
    20 normal test images and 8 for each of four kinds of defects, with exact masks.

    Args:
        root (Path | str): Folder to generate it in.
        category (str): ``"weave"`` or ``"speckle"``.
        generator_seed (int): Seed of the images.
        **kwargs: As for :class:`MVTec`.

    Raises:
        ValueError: If there is no such category.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     datamodule = TextureDemo(folder, category="speckle")
        ...     datamodule.prepare_data()
        ...     datamodule.setup()
        ...     len(datamodule.train_data), len(datamodule.val_data), len(datamodule.test_data)
        (54, 6, 52)
    """

    categories = tuple(_TEXTURES)

    def __init__(
        self,
        root: Path | str = "./datasets/TextureDemo",
        category: str = "weave",
        generator_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, category=category, **kwargs)
        self.generator_seed = generator_seed

    @property
    def name(self) -> str:
        """The data set's name."""
        return "TextureDemo"

    def prepare_data(self) -> None:
        """Generate the category, unless it is there already."""
        folder = self.root / self.category
        if _is_made(folder, self.generator_seed):
            return
        if folder.exists() and not (folder / "demo.json").is_file():
            msg = f"{self.root / self.category} exists but was not generated by TextureDemo: choose another root."
            raise FileExistsError(msg)
        generate(self.root, self.category, self.generator_seed)
        logger.info("Generated %s.", self.root / self.category)
