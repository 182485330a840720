# SPDX-License-Identifier: Apache-2.0
"""The loss of a painted image: eq. 12 on whole images, at the scales at which eq. 16 compares them."""

import torch
from torch import nn
from torch.nn.functional import mse_loss

from anomalib_intra.components.anomaly_map import halve
from anomalib_intra.components.similarity import SSIM_WINDOW, gms_difference, ssim_difference

#: Fewest pixels of a side: at half scale, a window of SSIM must lie inside.
SHORTEST_SIDE = 2 * SSIM_WINDOW


class PaintingLoss(nn.Module):
    """L2 + alpha * GMS difference at half and quarter scale + beta * SSIM difference at half scale, means over pixels.

    Args:
        alpha (float): Weight of the gradient magnitude differences.
        beta (float): Weight of the structural difference.

    Example:
        >>> images = torch.rand(1, 3, 64, 64)
        >>> bool(PaintingLoss()(images, images) < 1e-6)
        True
    """

    def __init__(self, alpha: float = 0.01, beta: float = 0.01) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta

    def forward(self, images: torch.Tensor, painted: torch.Tensor) -> torch.Tensor:
        """Compare painted images with the original ones.

        Args:
            images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)`` with sides of at least 10 pixels.
            painted (torch.Tensor): Painted images, shape ``(B, 3, H, W)``.

        Returns:
            torch.Tensor: The loss, a scalar in float32 or wider.
        """
        painted = painted.to(images.dtype)
        l2 = mse_loss(painted, images)
        x_half, y_half = halve(images), halve(painted)
        d_g = gms_difference(x_half, y_half).mean() + gms_difference(halve(x_half), halve(y_half)).mean()
        return l2 + self.alpha * d_g + self.beta * ssim_difference(x_half, y_half).mean()
