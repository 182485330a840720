# SPDX-License-Identifier: Apache-2.0
"""What images the models take."""

import torch
from einops import repeat


def as_colour(images: torch.Tensor) -> torch.Tensor:
    """Take one channel as three equal ones.

    Args:
        images (torch.Tensor): Images of shape ``(B, 3, H, W)`` or ``(B, 1, H, W)``.

    Returns:
        torch.Tensor: Images of shape ``(B, 3, H, W)``.

    Raises:
        ValueError: If they have another shape.

    Example:
        >>> as_colour(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        msg = f"Expected images of shape (B, 3, H, W) or (B, 1, H, W), got {tuple(images.shape)}."
        raise ValueError(msg)
    return images if images.shape[1] == 3 else repeat(images, "b 1 h w -> b c h w", c=3)


def check_range(images: torch.Tensor) -> None:
    """Refuse images with values that are not finite or not in [0, 1], and batches without any.

    Args:
        images (torch.Tensor): Images of any shape.

    Raises:
        ValueError: If there are such values, or no images.

    Example:
        >>> check_range(torch.tensor([0.0, float("nan")]))
        Traceback (most recent call last):
        ...
        ValueError: Images hold NaN or infinite values; the model needs finite values in [0, 1].
    """
    if images.numel() == 0:
        msg = f"The batch holds no images (shape {tuple(images.shape)}); the model needs at least one."
        raise ValueError(msg)
    low, high = images.aminmax()
    if not torch.isfinite(low + high):
        msg = "Images hold NaN or infinite values; the model needs finite values in [0, 1]."
        raise ValueError(msg)
    # Resizing may leave the range by a rounding error.
    if low < -1e-3 or high > 1 + 1e-3:
        msg = (
            f"Images hold values from {low:.3g} to {high:.3g}; the model needs values in [0, 1]: scale them, and leave "
            "out any Normalize transform."
        )
        raise ValueError(msg)
