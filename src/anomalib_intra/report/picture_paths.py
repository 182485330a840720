# SPDX-License-Identifier: Apache-2.0
"""Where the pictures of a test or a prediction are saved: each in a file of its own."""

from pathlib import Path
from typing import Any

from anomalib.utils.path import generate_output_filename
from lightning.pytorch import Trainer

#: What Windows does not allow in names.
_RESERVED = str.maketrans(dict.fromkeys('<>:"|?*\\', "_"))
#: Formats that are small and lose nothing that a picture shows; others become PNG.
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class PicturePaths:
    """Names the pictures of one test or prediction as anomalib does, but no two of them alike.

    Example:
        >>> import tempfile
        >>> trainer = Trainer(logger=False, accelerator="cpu")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     paths = PicturePaths(Path(folder))
        ...     for image in ("monday/good/0.png", "tuesday/good/0.png", "monday/good/0.png", None):
        ...         print(paths.of(image, trainer).relative_to(folder).as_posix())
        good/0.png
        good/0_2.png
        good/0.png
        image_0000.png
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._source_of: dict[Path, str] = {}
        self._of_source: dict[str, Path] = {}
        self._without_path = 0

    def of(self, image_path: str | None, trainer: Trainer) -> Path:
        """Name the picture of an image, and make its folder.

        Args:
            image_path (str | None): File of the image, if it has one.
            trainer (Trainer): The trainer, whose datamodule tells which folders are above the data set.

        Returns:
            Path: The file to save it to.
        """
        if not image_path:
            # (numbered through all processes)
            number = self._without_path * trainer.world_size + trainer.global_rank
            self._without_path += 1
            self.folder.mkdir(parents=True, exist_ok=True)
            return self.folder / f"image_{number:04}.png"
        if image_path not in self._of_source:
            self._of_source[image_path] = self._free(self._as_anomalib_does(image_path, trainer), image_path)
        return self._of_source[image_path]

    def _as_anomalib_does(self, image_path: str, trainer: Trainer) -> Path:
        datamodule: Any = getattr(trainer, "datamodule", None)
        root = getattr(datamodule, "root", None)
        path = generate_output_filename(
            input_path=image_path,
            output_path=self.folder,
            # Pictures keep their folders below the data set's, whatever that is called.
            dataset_name=Path(root).name if root else getattr(datamodule, "name", None),
            category=getattr(datamodule, "category", None),
        )
        name = path.name.translate(_RESERVED)
        return path.with_name(name if path.suffix.lower() in _SUFFIXES else f"{name}.png")

    def _free(self, path: Path, source: str) -> Path:
        wanted, number = path, 1
        while self._source_of.setdefault(_folded(path), source) != source:
            number += 1
            path = wanted.with_stem(f"{wanted.stem}_{number}")
        return path


def _folded(path: Path) -> Path:
    """Many file systems take names that differ in case alone for one."""
    return Path(str(path).casefold())
