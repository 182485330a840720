# SPDX-License-Identifier: Apache-2.0
"""Multiscale gradient magnitude similarity: what training makes small, and what scores are taken from."""

import torch
from kornia.filters import box_blur
from torch.nn.functional import interpolate

from anomalib_intra.components.anomaly_map import halve
from anomalib_intra.components.similarity import gms_difference

_SCALES = 4
#: Side of the mean filter in pixels.
_KERNEL = 21


def msgms_differences(images: torch.Tensor, reconstructions: torch.Tensor) -> list[torch.Tensor]:
    """One minus the gradient magnitude similarity at full, half, quarter and eighth scale.

    Args:
        images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)`` with sides of at least 8 pixels.
        reconstructions (torch.Tensor): Reconstructions, shape ``(B, 3, H, W)``.

    Returns:
        list[torch.Tensor]: Four maps in [0, 1], of shapes ``(B, 1, H, W)`` to ``(B, 1, H // 8, W // 8)``.

    Example:
        >>> [tuple(x.shape[-2:]) for x in msgms_differences(*torch.rand(2, 1, 3, 32, 48))]
        [(32, 48), (16, 24), (8, 12), (4, 6)]
    """
    differences = [gms_difference(images, reconstructions)]
    for _ in range(_SCALES - 1):
        images, reconstructions = halve(images), halve(reconstructions)
        differences.append(gms_difference(images, reconstructions))
    return differences


def msgms_map(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """The mean of the four scales at full size, smoothed by a 21 x 21 mean filter.

    Args:
        images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)`` with sides of at least 11 pixels.
        reconstructions (torch.Tensor): Reconstructions, shape ``(B, 3, H, W)``.

    Returns:
        torch.Tensor: Difference maps in [0, 1], shape ``(B, 1, H, W)``, in float32 or wider.

    Example:
        >>> msgms_map(*torch.rand(2, 1, 3, 32, 48)).shape
        torch.Size([1, 1, 32, 48])
    """
    with torch.autocast(images.device.type, enabled=False):
        size = images.shape[-2:]
        scales = msgms_differences(images, reconstructions)
        resized = [interpolate(scale, size=size, mode="bilinear", align_corners=False) for scale in scales]
        return box_blur(torch.stack(resized).mean(dim=0), _KERNEL)
