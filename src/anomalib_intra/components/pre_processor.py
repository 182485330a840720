# SPDX-License-Identifier: Apache-2.0
"""The pre-processor: resizes and nothing else."""

import torch
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Normalize, Transform

from anomalib_intra.components.exportable_resize import exportable


class UnnormalizedPreProcessor(PreProcessor):
    """Resizes images, with the same antialiasing in training, prediction and export.

    anomalib's own turns antialiasing off where a model is called directly or exported, which moves the scores of
    images that are made smaller.

    Args:
        transform (Transform | None): Transform of the images. Leaves values in [0, 1].

    Raises:
        ValueError: If the transform normalizes.

    Example:
        >>> from torchvision.transforms.v2 import Resize
        >>> UnnormalizedPreProcessor(Resize((64, 64)))(torch.rand(1, 3, 100, 80)).shape
        torch.Size([1, 3, 64, 64])
    """

    def __init__(self, transform: Transform | None = None) -> None:
        super().__init__(transform)
        refuse_normalization(self)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Transform images of shape ``(B, C, H, W)``."""
        if not self.transform:
            return batch
        transform = exportable(self.transform) if torch.compiler.is_compiling() else self.transform
        images: torch.Tensor = transform(batch)
        return images


def refuse_normalization(pre_processor: PreProcessor) -> None:
    """Refuse a pre-processor that normalizes.

    Args:
        pre_processor (PreProcessor): Any pre-processor.

    Raises:
        ValueError: If its transform contains ``Normalize``.
    """
    transform = getattr(pre_processor, "transform", None)
    if transform is not None and extract_transforms_by_type(transform, Normalize):
        msg = (
            "This model needs images in [0, 1], since its constants (of GMS and SSIM, or of the colour noise) are made "
            "for that range: take Normalize out of the pre-processor's transform."
        )
        raise ValueError(msg)
