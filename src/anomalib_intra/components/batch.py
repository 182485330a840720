# SPDX-License-Identifier: Apache-2.0
"""anomalib's image batch without rounding, and one with a field for the reconstruction."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from anomalib.data import ImageBatch, ImageItem
from torchvision.tv_tensors import Mask


@dataclass
class UnroundedBatch(ImageBatch):
    """An image batch whose scores and anomaly maps may be in float64, where anomalib would round them to float32.

    Two scores that differ before normalization still do after it.
    """

    @classmethod
    def of(cls, batch: ImageBatch) -> "UnroundedBatch":
        """Take over the fields of an image batch.

        Args:
            batch (ImageBatch): Any image batch.

        Returns:
            UnroundedBatch: The same fields; those that are new are empty.
        """
        return cls(**{field.name: getattr(batch, field.name) for field in fields(batch)})

    def rounded(self) -> "UnroundedBatch":
        """Give the same batch with scores and maps in float32.

        Returns:
            UnroundedBatch: A copy that shares all else; the batch itself where there is nothing to round.
        """
        double = [
            name
            for name in ("pred_score", "anomaly_map")
            if (value := getattr(self, name)) is not None and value.dtype == torch.float64
        ]
        if not double:
            return self
        batch = copy.copy(self)
        return batch.update(**{name: getattr(self, name).float() for name in double})

    @staticmethod
    def validate_anomaly_map(anomaly_map: torch.Tensor | None) -> Mask | None:
        """Check the map as anomalib does, but keep float64."""
        checked = ImageBatch.validate_anomaly_map(anomaly_map)
        return checked if checked is None else _keep_double(anomaly_map, checked, Mask)

    @staticmethod
    def validate_pred_score(pred_score: torch.Tensor | None) -> torch.Tensor | None:
        """Check the scores as anomalib does, but keep float64."""
        checked = ImageBatch.validate_pred_score(pred_score)
        return checked if checked is None else _keep_double(pred_score, checked, torch.as_tensor)


@dataclass
class _WithReconstruction:
    # A class of its own, since anomalib cannot resolve type hints of a batch class itself.
    reconstruction: torch.Tensor | None = None
    difference: torch.Tensor | None = None


@dataclass
class InTraItem(_WithReconstruction, ImageItem):
    """An image item with its reconstruction, shape ``(3, H, W)``, and difference map, shape ``(1, H, W)``."""


@dataclass
class InTraBatch(_WithReconstruction, UnroundedBatch):
    """An unrounded image batch with its reconstruction, ``(B, 3, H, W)``, and difference map, ``(B, 1, H, W)``."""

    item_class: ClassVar[type[InTraItem]] = InTraItem


def _keep_double(given: object, checked: torch.Tensor, wrap: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    if isinstance(given, torch.Tensor) and given.dtype == torch.float64:
        return wrap(given.reshape(checked.shape))
    return checked


def is_normal(batch: ImageBatch) -> torch.Tensor:
    """Tell which images of a batch are normal: all that are not labelled anomalous.

    Args:
        batch (ImageBatch): Any image batch.

    Returns:
        torch.Tensor: Booleans of shape ``(B,)``, on the images' device.

    Example:
        >>> is_normal(ImageBatch(image=torch.rand(2, 3, 8, 8), gt_label=torch.tensor([0, 1])))
        tensor([ True, False])
    """
    images = torch.as_tensor(batch.image)
    if batch.gt_label is None:
        return torch.ones(len(images), dtype=torch.bool, device=images.device)
    return ~batch.gt_label.bool().to(images.device)
