# SPDX-License-Identifier: Apache-2.0
"""The inpainting loss (eq. 12)."""

import torch
from torch import nn
from torch.nn.functional import mse_loss

from anomalib_intra.components.similarity import SSIM_WINDOW, gms_difference, ssim_difference


class InpaintingLoss(nn.Module):
    """Pixel-wise L2 plus alpha * GMS difference plus beta * SSIM difference (eq. 12).

    All three terms are means over pixels, so that losses of different patch and image sizes can be compared.

    Args:
        alpha (float): Weight of the gradient magnitude difference.
        beta (float): Weight of the structural difference.

    Example:
        >>> loss = InpaintingLoss(alpha=0.01, beta=0.01)
        >>> patches = torch.rand(4, 3, 16, 16)
        >>> bool(loss(patches, patches) < 1e-6)
        True
    """

    def __init__(self, alpha: float = 0.01, beta: float = 0.01) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta

    def forward(self, patches: torch.Tensor, inpainted: torch.Tensor) -> torch.Tensor:
        """Compare inpainted patches with the original ones.

        Args:
            patches (torch.Tensor): Original patches in [0, 1], shape ``(B, C, K, K)`` with K of at least 5.
            inpainted (torch.Tensor): Inpainted patches, shape ``(B, C, K, K)``.

        Returns:
            torch.Tensor: The loss, a scalar in float32 or wider.

        Raises:
            ValueError: If the patches are smaller than the window of SSIM.
        """
        if min(patches.shape[-2:]) < SSIM_WINDOW:
            msg = (
                f"The SSIM term of the loss needs patches of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, got "
                f"{patches.shape[-2]} x {patches.shape[-1]}: choose a larger patch_size."
            )
            raise ValueError(msg)
        l2 = mse_loss(inpainted.to(patches.dtype), patches)
        d_g = gms_difference(patches, inpainted).mean()
        d_s = ssim_difference(patches, inpainted).mean()
        return l2 + self.alpha * d_g + self.beta * d_s
