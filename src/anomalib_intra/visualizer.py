# SPDX-License-Identifier: Apache-2.0
"""Pictures: original | reconstruction | anomaly map | predicted and true mask."""

from pathlib import Path
from typing import Any

import torch
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import Visualizer
from anomalib.visualization.image.functional import (
    add_text_to_image,
    create_image_grid,
    overlay_image,
    visualize_anomaly_map,
    visualize_image,
    visualize_mask,
)
from lightning.pytorch import Trainer
from PIL import Image

from anomalib_intra.batch import InTraBatch, InTraItem

_PREDICTED, _TRUE = (255, 0, 0), (0, 255, 0)
# Raw anomaly maps are shown as in the paper's Figure 4.
_RAW_SCALE = 50


class InTraVisualizer(Visualizer):
    """Saves a row of panels for every image that is tested or predicted, where anomalib saves its pictures.

    The panels are the image, its reconstruction, the anomaly map and the image with the outlines of the predicted mask
    (red) and the true mask (green). All anomaly maps of a run share one scale: half of it is the threshold, or, with
    normalization off, raw values are multiplied by 50 as in the paper's Figure 4.

    Args:
        field_size (tuple[int, int]): Width and height of a panel in pixels.
        output_dir (str | Path | None): Folder for the pictures. Defaults to ``images`` in the run's folder.

    Example:
        >>> item = InTraItem(image=torch.rand(3, 64, 64), reconstruction=torch.rand(3, 64, 64),
        ...                  anomaly_map=torch.rand(64, 64), pred_mask=torch.rand(64, 64) > 0.5)
        >>> InTraVisualizer(field_size=(128, 128)).visualize(item).size
        (512, 128)
    """

    def __init__(self, field_size: tuple[int, int] = (256, 256), output_dir: str | Path | None = None) -> None:
        super().__init__()
        self.field_size = field_size
        self.output_dir = output_dir

    def visualize(self, item: InTraItem, normalized: bool = True) -> Image.Image:
        """Draw one image.

        Args:
            item (InTraItem): Image with reconstruction, anomaly map and, where known, masks.
            normalized (bool): Whether the anomaly map is normalized.

        Returns:
            Image.Image: The panels side by side.
        """
        image = self._panel(item.image)
        panels = {"Image": image}
        if item.reconstruction is not None:
            panels["Reconstruction"] = self._panel(item.reconstruction)
        if item.anomaly_map is not None:
            scaled = (item.anomaly_map.float() * (1 if normalized else _RAW_SCALE)).clamp(0, 1)
            panels["Anomaly map"] = visualize_anomaly_map(scaled.cpu()).resize(self.field_size)
        outlines = image.convert("RGBA")
        for mask, colour in ((item.gt_mask, _TRUE), (item.pred_mask, _PREDICTED)):
            if mask is not None:
                drawn = visualize_mask(torch.as_tensor(mask).cpu().bool(), mode="binary").resize(self.field_size)
                outlines = overlay_image(outlines, visualize_mask(drawn, mode="contour", color=colour), alpha=1.0)
        panels["Masks (red: predicted)"] = outlines
        titled = [add_text_to_image(panel.convert("RGB"), title, size=16) for title, panel in panels.items()]
        return create_image_grid(titled, nrow=len(titled))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: InTraBatch, batch: InTraBatch, *args: Any, **kwargs: Any
    ) -> None:
        """Save the pictures of a batch."""
        del outputs, args, kwargs
        folder = Path(self.output_dir or Path(trainer.default_root_dir) / "images")
        datamodule = getattr(trainer, "datamodule", None)
        root = getattr(datamodule, "root", None)
        for item in batch:
            filename = generate_output_filename(
                input_path=item.image_path or "image.png",
                output_path=folder,
                # Pictures keep their folders below the data set's, whatever that is called.
                dataset_name=Path(root).name if root else getattr(datamodule, "name", None),
                category=getattr(datamodule, "category", None),
            )
            self.visualize(item, pl_module.post_processor.enable_normalization).save(filename)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: InTraBatch, batch: InTraBatch, *args: Any, **kwargs: Any
    ) -> None:
        """Save the pictures of a batch."""
        self.on_test_batch_end(trainer, pl_module, outputs, batch, *args, **kwargs)

    def _panel(self, image: torch.Tensor) -> Image.Image:
        return visualize_image(torch.as_tensor(image).detach().float().clamp(0, 1).cpu()).resize(self.field_size)
