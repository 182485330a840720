# SPDX-License-Identifier: Apache-2.0
"""What images the models take."""

import torch


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
