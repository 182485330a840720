# SPDX-License-Identifier: Apache-2.0
"""The loss of an inpainted image."""

import torch
from torch import nn
from torch.nn.functional import mse_loss

from anomalib_intra.components.similarity import ssim_difference
from anomalib_intra.riad.msgms import msgms_differences

#: Side of the Gaussian window of SSIM in pixels, the usual one: here whole images are compared, not patches.
_SSIM_WINDOW = 11


class RIADLoss(nn.Module):
    """L2 + multiscale GMS difference + SSIM difference, each a mean over pixels, all with a weight of 1.

    Each of the four scales counts alike, whatever its number of pixels.

    Example:
        >>> images = torch.rand(1, 3, 32, 32)
        >>> bool(RIADLoss()(images, images) < 1e-6)
        True
    """

    def forward(self, images: torch.Tensor, inpainted: torch.Tensor) -> torch.Tensor:
        """Compare inpainted images with the original ones.

        Args:
            images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)`` with sides of at least 11 pixels.
            inpainted (torch.Tensor): Inpainted images, shape ``(B, 3, H, W)``.

        Returns:
            torch.Tensor: The loss, a scalar in float32 or wider.
        """
        scales = [difference.mean() for difference in msgms_differences(images, inpainted)]
        d_s = ssim_difference(images, inpainted, _SSIM_WINDOW).mean()
        return mse_loss(inpainted, images) + torch.stack(scales).mean() + d_s
