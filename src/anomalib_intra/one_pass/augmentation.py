# SPDX-License-Identifier: Apache-2.0
"""What normal images may differ in: light, and with parts that lie anyhow, the angle."""

import torch
from kornia.geometry.transform import rotate

_GAIN, _OFFSET = 0.1, 0.02


def vary_light(images: torch.Tensor) -> torch.Tensor:
    """Let the light drift, as it does from shift to shift: each image gets a gain and an offset of its own.

    Args:
        images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``.

    Returns:
        torch.Tensor: Images in [0, 1], of the same shape.

    Example:
        >>> vary_light(torch.full((2, 3, 8, 8), 0.5)).std(dim=(1, 2, 3)) < 1e-6
        tensor([True, True])
    """
    gain, offset = (torch.randn(len(images), 1, 1, 1).clamp(-2, 2).to(images) for _ in range(2))
    return (images * (_GAIN * gain).exp() + _OFFSET * offset).clamp(0, 1)


def turn(images: torch.Tensor) -> torch.Tensor:
    """Turn images by any angle around their middle; what comes in at the corners is mirrored.

    Args:
        images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``.

    Returns:
        torch.Tensor: Images in [0, 1], of the same shape.

    Example:
        >>> bool((turn(torch.full((2, 3, 8, 8), 0.5)) - 0.5).abs().max() < 1e-5)
        True
    """
    angles = 360 * torch.rand(len(images)).to(images)
    return rotate(images, angles, padding_mode="reflection", align_corners=False).clamp(0, 1)
