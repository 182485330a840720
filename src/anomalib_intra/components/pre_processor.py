# SPDX-License-Identifier: Apache-2.0
"""The pre-processor: crops, pads and resizes, alike in training, calibration, test and export."""

from typing import Any

import torch
from anomalib.data import ImageBatch
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback
from torchvision.transforms.v2 import Compose, Normalize, Resize, Transform
from torchvision.tv_tensors import Image as TVImage
from torchvision.tv_tensors import Mask as TVMask

from anomalib_intra.components.exportable_resize import exportable
from anomalib_intra.data.pipeline import parts_of, refuse_random


class UnnormalizedPreProcessor(PreProcessor):
    """Transforms images, with the same antialiasing in training, prediction and export.

    anomalib's own turns antialiasing off where a model is called directly or exported, which moves the scores of
    images that are made smaller. And its datamodules resize images as the pre-processor will before it crops or pads
    them, which is right only where it resizes first; a resize that comes later is kept from them.

    Args:
        transform (Transform | None): Transform of the images. Leaves values in [0, 1].

    Raises:
        ValueError: If the transform normalizes, is random, or leaves another number of channels than 3.

    Example:
        >>> UnnormalizedPreProcessor(Resize((64, 64)))(torch.rand(1, 3, 100, 80)).shape
        torch.Size([1, 3, 64, 64])
    """

    def __init__(self, transform: Transform | None = None) -> None:
        super().__init__(_resized_in_its_place(transform))
        refuse_unfit(self)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        """Transform a batch."""
        del trainer, pl_module
        self._transform(batch)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        """Transform a batch."""
        del trainer, pl_module
        self._transform(batch)

    def on_test_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        """Transform a batch."""
        del trainer, pl_module
        self._transform(batch)

    def on_predict_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        """Transform a batch."""
        del trainer, pl_module
        self._transform(batch)

    def _transform(self, batch: ImageBatch) -> None:
        images, masks = batch.image, batch.gt_mask
        for part in parts_of(self.transform):
            # Some of anomalib's transforms forget which is which, and what comes behind them then leaves masks alone.
            images, masks = part(TVImage(images), None if masks is None else TVMask(masks))
        batch.image, batch.gt_mask = images, masks

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Transform images of shape ``(B, C, H, W)``."""
        if not self.transform:
            return batch
        transform = exportable(self.transform) if torch.compiler.is_compiling() else self.transform
        images: torch.Tensor = transform(batch)
        return images

    def checkpoint_config(self) -> dict[str, Any]:
        """Describe the transform for a checkpoint, in words too where anomalib cannot store it.

        Returns:
            dict[str, Any]: Plain data.
        """
        return {**super().checkpoint_config(), "described": repr(self.transform)}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore the transform; one that is not stored must be given again.

        Args:
            config (dict[str, Any]): What :meth:`checkpoint_config` gave.

        Raises:
            ValueError: If the checkpoint's transform is not stored, and this one is another.
        """
        wanted = config.get("described", repr(None))
        if config.get("transform") is None and wanted != repr(None):
            if repr(self.transform) != wanted:
                msg = (
                    "The checkpoint was made with a pre-processor whose transform a checkpoint cannot hold: build the "
                    f"model with pre_processor=PreProcessor(...) of this transform again: {' '.join(wanted.split())}."
                )
                raise ValueError(msg)
            return
        super().load_checkpoint_config(config)
        self.transform = _resized_in_its_place(self.transform)


class OnImagesOnly(Callback):
    """A pre-processor as Lightning sees it: without its hook for training steps.

    Steps are taken on samples of images that went through the pre-processor when they were read.

    Args:
        pre_processor (PreProcessor): Any pre-processor.
    """

    def __init__(self, pre_processor: PreProcessor) -> None:
        hooks = [name for name in dir(Callback) if name.startswith("on_") or name in ("setup", "teardown")]
        for name in hooks:
            if name != "on_train_batch_start":
                setattr(self, name, getattr(pre_processor, name))


def refuse_unfit(pre_processor: PreProcessor) -> None:
    """Refuse a pre-processor that no model of this package can work with.

    Args:
        pre_processor (PreProcessor): Any pre-processor.

    Raises:
        ValueError: If its transform normalizes, is random, or leaves another number of channels than 3.
    """
    transform = getattr(pre_processor, "transform", None)
    if any(isinstance(part, Normalize) for part in parts_of(transform)):
        msg = (
            "This model needs images in [0, 1], since its constants (of GMS and SSIM, or of the colour noise) are made "
            "for that range: take Normalize out of the pre-processor's transform."
        )
        raise ValueError(msg)
    refuse_random(transform, "The pre-processor")
    try:
        channels = len(transform(torch.zeros(3, 64, 64))) if transform is not None else 3
    except Exception:  # made for other images: the first of them will tell
        return
    if channels != 3:
        msg = (
            f"The pre-processor leaves {channels} of 3 channels: models take 3, so give Grayscale "
            "num_output_channels=3, or leave it out."
        )
        raise ValueError(msg)


def _resized_in_its_place(transform: Transform | None) -> Transform | None:
    """Hide a resize that does not come first from anomalib's datamodules, which look one level deep."""
    parts = parts_of(transform)
    if extract_transforms_by_type(transform, Resize) and not isinstance(parts[0], Resize):
        return Compose([transform])
    return transform
