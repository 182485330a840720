# SPDX-License-Identifier: Apache-2.0
"""Pictures: original | reconstruction | anomaly map | predicted and true mask."""

from pathlib import Path
from typing import Any

from anomalib.utils.path import generate_output_filename
from anomalib.visualization import Visualizer
from lightning.pytorch import Trainer
from PIL import Image

from anomalib_intra.components.batch import InTraBatch, InTraItem
from anomalib_intra.report.panels import draw_panels, side_by_side


class InTraVisualizer(Visualizer):
    """Saves a row of panels for every image that is tested or predicted, where anomalib saves its pictures.

    The panels are the image, its reconstruction, the anomaly map and the image with the outlines of the predicted mask
    (red) and the true mask (cyan). All anomaly maps of a run share one scale: half of it is the threshold, or, with
    normalization off, raw values are multiplied by 50 as in the paper's Figure 4.

    Args:
        field_size (tuple[int, int]): Width and height within which a panel fits, in pixels; images keep their
            proportions.
        output_dir (str | Path | None): Folder for the pictures. Defaults to ``images`` in the run's folder.

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
            scale = pl_module.post_processor.display_scale
            self.visualize(item, scale).save(filename)  # type: ignore[arg-type]  # (items are of item_class)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: InTraBatch, batch: InTraBatch, *args: Any, **kwargs: Any
    ) -> None:
        """Save the pictures of a batch."""
        self.on_test_batch_end(trainer, pl_module, outputs, batch, *args, **kwargs)
