# SPDX-License-Identifier: Apache-2.0
"""A model that paints an image again: what differs from the original is anomalous (sec. 3.5, eq. 16-18)."""

import logging
from abc import abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from einops import rearrange
from lightning.pytorch.utilities.types import STEP_OUTPUT
from rich.progress import track
from torch.utils.data import DataLoader
from torchmetrics import R2Score

from anomalib_intra.components.anomaly_map import difference_map
from anomalib_intra.components.batch import InTraBatch, is_normal
from anomalib_intra.components.reconstruction import Comparison
from anomalib_intra.components.reconstruction_post_processor import PAPERS_MAP, InTraPostProcessor
from anomalib_intra.components.trained_module import TrainedModule
from anomalib_intra.components.visualizer import InTraVisualizer

logger = logging.getLogger(__name__)

#: Share of the pixels' variance below which a model that explains no more has learned next to nothing.
_COLLAPSED = 0.1


class InferenceWithReconstruction(NamedTuple):
    """anomalib's four outputs, and what they were computed from."""

    pred_score: torch.Tensor
    pred_label: torch.Tensor | None
    anomaly_map: torch.Tensor
    pred_mask: torch.Tensor | None
    image: torch.Tensor
    reconstruction: torch.Tensor


class ReconstructionModule(TrainedModule):
    """An anomalib model that paints images again, and scores them by the difference.

    A model adds ``self.model``, which maps images to a ``Reconstruction`` (where it maps them to something else, a
    :meth:`compare` of its own), its ``sampling``, ``self.loss`` and :meth:`loss_of`. What is here is the same for all:
    the training mean of the difference maps (eq. 17), thresholds, test, prediction, pictures, export, and the
    checkpoints of the best and the last epoch.

    Args:
        image_size (tuple[int, int]): Height and width to which images are resized.
        pre_processor (PreProcessor | bool): As for :class:`TrainedModule`.
        **components (Any): As for :class:`TrainedModule`.
    """

    keeps_best = True

    post_processor: InTraPostProcessor
    post_processor_kind = InTraPostProcessor
    batch_kind = InTraBatch

    def __init__(self, image_size: tuple[int, int], pre_processor: PreProcessor | bool, **components: Any) -> None:
        super().__init__(image_size, pre_processor, **components)
        # One minus the squared error as a share of that of a flat image in the mean colour.
        self._explained = R2Score(multioutput="variance_weighted")
        self._exports_reconstruction = False

    # ---- what a model decides ----------------------------------------------------------------------------------------

    @abstractmethod
    def loss_of(self, batch: Any) -> torch.Tensor:
        """Compute the loss of a training step.

        Args:
            batch (Any): Samples of the step.

        Returns:
            torch.Tensor: The loss, a scalar.
        """

    def validation_loss(self, images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        """Compare held-out normal images with their reconstructions.

        Args:
            images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``.
            reconstructions (torch.Tensor): Reconstructions, shape ``(B, 3, H, W)``.

        Returns:
            torch.Tensor: The mean loss, a scalar.
        """
        loss: torch.Tensor = self.loss(images, reconstructions)
        return loss

    def compare(self, images: torch.Tensor) -> Comparison:
        """Paint images again, and compare both (eq. 16).

        Args:
            images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``.

        Returns:
            Comparison: Images, reconstructions and difference maps.
        """
        image, reconstruction = self.model(images)
        return Comparison(
            image, reconstruction, difference_map(image, reconstruction, self.post_processor.colour_weight)
        )

    # ---- components --------------------------------------------------------------------------------------------------

    @classmethod
    def configure_visualizer(cls) -> Visualizer:
        """Original, reconstruction, anomaly map and masks side by side.

        Returns:
            Visualizer: An :class:`InTraVisualizer`.
        """
        return InTraVisualizer()

    # ---- training ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Compute the loss of a step, and log it.

        Args:
            batch (Any): Samples of the step.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            STEP_OUTPUT: The loss.
        """
        del args, kwargs
        loss = self.loss_of(batch)
        self.log_train_loss(loss, len(batch))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Begin to compare with a flat image anew."""
        super().on_validation_epoch_start()
        self._explained.reset()

    def validation_step(self, batch: InTraBatch, *args: Any, **kwargs: Any) -> InTraBatch:
        """Paint the normal images of a batch again and compare both.

        Args:
            batch (InTraBatch): Batch of images; gets reconstructions and difference maps.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            InTraBatch: The batch.
        """
        del args, kwargs
        batch = self._compared(batch)
        normal = is_normal(batch)
        if normal.any():
            images, reconstructions = (torch.as_tensor(x)[normal].float() for x in (batch.image, batch.reconstruction))
            self.add_val_loss(self.validation_loss(images, reconstructions), int(normal.sum()))
            self._explained.update(*(rearrange(x, "b c h w -> (b h w) c") for x in (reconstructions, images)))
        return batch

    def end_training(self) -> None:
        """Say so if the model has learned nothing; then calibrate it."""
        # Of several processes, one may have seen no normal image, and all must compute, or none.
        all_know = self.trainer.strategy.reduce_boolean_decision(self._explained.update_called, all=True)
        if all_know and (explained := self._explained.compute()) < _COLLAPSED:
            logger.warning(
                "The reconstructions of held-out images are hardly better than a flat image of their mean colour (R2 "
                "%.3f; 1 is perfect, 0 is flat): the model has learned next to nothing. Train for longer, or with "
                "another learning_rate.",
                explained,
            )
        super().end_training()

    # ---- calibration -------------------------------------------------------------------------------------------------

    not_calibrated = "This checkpoint has no training mean (its training was cut off, or its settings were others)."

    @property
    def is_calibrated(self) -> bool:
        """Whether the training mean is there."""
        return self.post_processor.is_calibrated

    def learn_normal(self, images: DataLoader[Any]) -> None:
        """Compute the training mean (eq. 17).

        Args:
            images (DataLoader): Training images, as a test would see them.
        """
        total, count = torch.zeros(2, 1, *self.image_size, device=self.device), 0
        for batch in track(images, "Training mean (eq. 17)"):
            batch = self._compared(self.as_tested(batch))
            normal = is_normal(batch)
            maps = torch.as_tensor(batch.difference)[normal]
            total += torch.stack([maps.sum(dim=0), maps.square().sum(dim=0)])
            count += len(maps)
        mean, mean_square = self.mean_of_all(total, count)[:, None]
        self.post_processor.set_training_mean(mean, (mean_square - mean**2).clamp(min=0).sqrt())

    def _compared(self, batch: ImageBatch) -> InTraBatch:
        assert isinstance(batch, InTraBatch), "the batch_kind"
        with self.trainer.precision_plugin.forward_context():
            _, batch.reconstruction, batch.difference = self.compare(torch.as_tensor(batch.image))
        return batch

    # ---- test and prediction -----------------------------------------------------------------------------------------

    def test_step(self, batch: InTraBatch, *args: Any, **kwargs: Any) -> InTraBatch:
        """Compare a batch with its reconstruction; the post-processor scores it.

        Args:
            batch (InTraBatch): Batch of images; gets reconstructions and difference maps.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            InTraBatch: The batch.
        """
        del args, kwargs
        return self._compared(batch)

    # ---- export ------------------------------------------------------------------------------------------------------

    def forward(self, batch: torch.Tensor, *args: Any, **kwargs: Any) -> InferenceBatch | InferenceWithReconstruction:
        """Score images of any size, as an exported model does.

        Args:
            batch (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            InferenceBatch | InferenceWithReconstruction: Scores ``(B,)``, labels, and maps and masks of the model's
            size; while :meth:`to_onnx` exports it, also the reconstruction.
        """
        del args, kwargs
        compared = self.compare(self.pre_processor(batch) if self.pre_processor else batch)
        scored = self.post_processor(compared)
        if not self._exports_reconstruction:
            return scored
        return InferenceWithReconstruction(
            **scored._asdict(), image=compared.image, reconstruction=compared.reconstruction
        )

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        reconstruction: bool = False,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX, on request with what the model expected to see.

        Engine and command line hand ``onnx_kwargs`` on to this method, for OpenVINO too.

        Args:
            export_root (Path | str): Folder in which ``weights/onnx`` is made.
            model_file_name (str): Name of the file, without suffix.
            input_size (tuple[int, int] | None): Height and width of all images; any by default.
            reconstruction (bool): Give the outputs ``image``, resized as the model saw it, and ``reconstruction``, both
                of shape ``(B, 3, H, W)``, beside the four standard ones. anomalib's inferencers refuse models with more
                outputs than those four.
            **kwargs (Any): Arguments of ``torch.onnx.export``.

        Returns:
            Path: The ONNX file.

        Example:
            >>> engine.export(model, "onnx", onnx_kwargs={"reconstruction": True})  # doctest: +SKIP
        """
        self._exports_reconstruction = reconstruction
        try:
            return super().to_onnx(export_root, model_file_name, input_size, **kwargs)
        finally:
            self._exports_reconstruction = False

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what was stored, also by an older version."""
        # What that does not say of its calibration is in its settings, or was as in the paper: it stays so.
        checkpoint["anomalib_post_processor_config"] = {
            **PAPERS_MAP,
            **checkpoint.get("anomalib_post_processor_config", {}),
        }
        super().on_load_checkpoint(checkpoint)
