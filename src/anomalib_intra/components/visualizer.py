# SPDX-License-Identifier: Apache-2.0
"""Pictures: original | reconstruction | anomaly map | predicted and true mask."""

from pathlib import Path
from typing import Any

import torch
from anomalib.data import ImageBatch
from anomalib.visualization import ImageVisualizer, Visualizer
from anomalib.visualization.image.item_visualizer import visualize_image_item
from lightning.pytorch import Trainer
from PIL import Image

from anomalib_intra.components.batch import InTraBatch, InTraItem
from anomalib_intra.report.panels import draw_panels, side_by_side
from anomalib_intra.report.picture_paths import PicturePaths


class _NamedPictures(Visualizer):
    output_dir: str | Path | None
    _paths: PicturePaths

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin to name the pictures anew, in the folder of this run."""
        del pl_module
        self._paths = PicturePaths(Path(self.output_dir or Path(trainer.default_root_dir) / "images"))

    on_predict_start = on_test_start


class InTraVisualizer(_NamedPictures):
    """Saves a row of panels for every image that is tested or predicted, where anomalib saves its pictures.

    The panels are the image, its reconstruction, the anomaly map and the image with the outlines of the predicted mask
    (red) and the true mask (cyan). All anomaly maps of a run share one scale: half of it is the threshold, or, of InTra
    with normalization off, raw values are multiplied by 50 as in the paper's Figure 4.

    Args:
        field_size (tuple[int, int]): Width and height within which a panel fits, in pixels; images keep their
            proportions.
        output_dir (str | Path | None): Folder for the pictures. Defaults to ``images`` in the folder of the run, or of
            this prediction.

    Example:
        >>> import torch
        >>> item = InTraItem(image=torch.rand(3, 64, 64), reconstruction=torch.rand(3, 64, 64),
        ...                  anomaly_map=torch.rand(64, 64), pred_mask=torch.rand(64, 64) > 0.5)
        >>> InTraVisualizer(field_size=(128, 128)).visualize(item).size
        (524, 152)
    """

    def __init__(self, field_size: tuple[int, int] = (256, 256), output_dir: str | Path | None = None) -> None:
        super().__init__()
        self.field_size = field_size
        self.output_dir = output_dir

    def visualize(self, item: InTraItem, scale: float = 1.0) -> Image.Image:
        """Draw one image.

        Args:
            item (InTraItem): Image with reconstruction, anomaly map and, where known, masks.
            scale (float): What the anomaly map is multiplied by; 1 for normalized maps, else the post-processor's
                ``display_scale``.

        Returns:
            Image.Image: The panels side by side, each below its title.
        """
        return side_by_side(draw_panels(item, self.field_size, scale))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: InTraBatch, batch: InTraBatch, *args: Any, **kwargs: Any
    ) -> None:
        """Save the pictures of a batch."""
        del outputs, args, kwargs
        for item in batch:
            picture = self.visualize(item, pl_module.post_processor.display_scale)  # type: ignore[arg-type]  # (item_class)
            picture.save(self._paths.of(item.image_path, trainer))

    on_predict_batch_end = on_test_batch_end


class NamedImageVisualizer(_NamedPictures, ImageVisualizer):
    """anomalib's pictures, each in a file of its own, in the folder of the run that is under way.

    anomalib's own lets images of equal names, and all without a path, write over each other, and keeps to the folder of
    its first run. It draws raw maps as they are, so that a value of 1.01 looks like 0; here they share a scale, as
    those of :class:`InTraVisualizer` do.
    """

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: ImageBatch, batch: ImageBatch, *args: Any, **kwargs: Any
    ) -> None:
        """Save the pictures of a batch."""
        del outputs, args, kwargs
        settings = ("fields", "overlay_fields", "field_size", "fields_config", "overlay_fields_config", "text_config")
        scale = pl_module.post_processor.display_scale
        for item in batch:  # (items of their own, whose fields can be changed)
            item.anomaly_map = (torch.as_tensor(item.anomaly_map) * scale).clamp(0, 1)
            picture = visualize_image_item(item, **{name: getattr(self, name) for name in settings})
            if picture is not None:
                picture.save(self._paths.of(item.image_path, trainer))

    on_predict_batch_end = on_test_batch_end
