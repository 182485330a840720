# SPDX-License-Identifier: Apache-2.0
"""Antialiased bilinear resizing as two matrix products, which every runtime computes alike."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from anomalib.pre_processing.utils.transform import convert_center_crop_transform
from torchvision.transforms.v2 import Compose, InterpolationMode, Resize, Transform

logger = logging.getLogger(__name__)


def exportable(transform: Transform) -> Transform:
    """Replace what runtimes do not know, or do not compute alike, in a transform.

    Args:
        transform (Transform): A transform of images, or a ``Compose`` of such.

    Returns:
        Transform: The same transform for images of shape ``(B, C, H, W)``; the given one is left as it is.

    Example:
        >>> images = torch.rand(1, 3, 100, 80)
        >>> torch.allclose(exportable(Resize((64, 48)))(images), Resize((64, 48))(images), atol=1e-6)
        True
    """
    if isinstance(transform, Compose):
        return Compose([exportable(part) for part in transform.transforms])
    if isinstance(transform, Resize) and transform.antialias:
        # (torchvision keeps the mode as it was given, and its own default as a string)
        bilinear = transform.interpolation in (InterpolationMode.BILINEAR, InterpolationMode.BILINEAR.value)
        if bilinear and len(transform.size) == 2:
            return ExportableResize(transform.size)
        logger.warning(
            "OpenVINO ignores the antialiasing of %s, which moves the scores of images that are made smaller: give "
            "Resize height and width and leave its interpolation bilinear.",
            transform,
        )
    return convert_center_crop_transform(transform)


class ExportableResize(Transform):  # type: ignore[misc]  # torchvision has no types
    """The same as torchvision's antialiased bilinear ``Resize``, in operations that any runtime knows.

    ONNX has an antialiased resize only since opset 18, and OpenVINO ignores its antialiasing without a word.

    Args:
        size (Sequence[int]): Height and width of the result.

    Example:
        >>> ExportableResize((64, 48))(torch.rand(2, 3, 100, 80)).shape
        torch.Size([2, 3, 64, 48])
    """

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Resize images.

        Args:
            images (torch.Tensor): Images of shape ``(B, C, H, W)``.

        Returns:
            torch.Tensor: Images of shape ``(B, C, *size)``.
        """
        rows, columns = (
            resize_matrix(old, new, images.device) for old, new in zip(images.shape[-2:], self.size, strict=True)
        )
        return rows @ images @ columns.T


def resize_matrix(old: int, new: int, device: torch.device | None = None) -> torch.Tensor:
    """Weights with which antialiased bilinear resizing averages pixels: triangles that sum to 1.

    Args:
        old (int): Number of pixels before.
        new (int): Number of pixels after.
        device (torch.device | None): Device of the weights.

    Returns:
        torch.Tensor: Weights in float32, shape ``(new, old)``.

    Example:
        >>> resize_matrix(4, 2)
        tensor([[0.4286, 0.4286, 0.1429, 0.0000],
                [0.0000, 0.1429, 0.4286, 0.4286]])
    """
    # Pixel centres, and the distances between them, in units of 1 / (2 old new) of the image's side: whole numbers, so
    # that a runtime that computes in bfloat16 cannot get them wrong.
    centre_old = (2 * torch.arange(old, device=device) + 1) * new
    centre_new = (2 * torch.arange(new, device=device) + 1) * old
    reach: Any = 2 * torch.sym_max(old, new)  # a symbol of torch while it exports
    distance = (centre_new[:, None] - centre_old).abs()
    triangle = (-distance + reach).clamp(min=0)
    return triangle / triangle.sum(dim=1, keepdim=True)
