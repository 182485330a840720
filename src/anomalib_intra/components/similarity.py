# SPDX-License-Identifier: Apache-2.0
"""Difference maps by gradient magnitude similarity (eq. 11) and by structural similarity.

Both are meant for images in [0, 1]: their constants are tied to that range. They always compute in float32 or wider,
also under autocast.
"""

import torch
from kornia.filters import filter2d
from kornia.metrics import ssim

#: Side of the Gaussian window of SSIM in pixels.
SSIM_WINDOW = 5

_GMS_CONSTANT = 170 / 255**2
_EPSILON = 1e-12
_PREWITT = [[1.0, 0.0, -1.0]] * 3


def gradient_magnitude(images: torch.Tensor) -> torch.Tensor:
    """Gradient magnitude by Prewitt filters / 3, each channel alone, borders replicated.

    Replicating keeps the border free of edges that are not in the image. Epsilon stands inside the root, so that the
    gradient is finite on constant images.

    Args:
        images (torch.Tensor): Images in [0, 1], shape ``(B, C, H, W)``.

    Returns:
        torch.Tensor: Gradient magnitudes, shape ``(B, C, H, W)``.

    Example:
        >>> gradient_magnitude(torch.full((1, 1, 4, 4), 0.5)).max() < 1e-5
        tensor(True)
    """
    kernel = torch.tensor(_PREWITT, device=images.device, dtype=images.dtype) / 3
    horizontal = filter2d(images, kernel[None], border_type="replicate")
    vertical = filter2d(images, kernel.T[None], border_type="replicate")
    return torch.sqrt(horizontal**2 + vertical**2 + _EPSILON)


def colour_difference(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Absolute difference, mean over channels; not in the paper.

    Args:
        images (torch.Tensor): Images in [0, 1], shape ``(B, C, H, W)``.
        reconstructions (torch.Tensor): Reconstructions, shape ``(B, C, H, W)``.

    Returns:
        torch.Tensor: Differences, in [0, 1] where the reconstructions are, shape ``(B, 1, H, W)``.

    Example:
        >>> colour_difference(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)).unique()
        tensor([1.])
    """
    return (wide(images) - wide(reconstructions)).abs().mean(dim=1, keepdim=True)


def gms_difference(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Difference map d_g: one minus the gradient magnitude similarity, mean over channels (eq. 11).

    The constant is that of RIAD, 170 / 255 ** 2 (0.0026).

    Args:
        images (torch.Tensor): Images in [0, 1], shape ``(B, C, H, W)``.
        reconstructions (torch.Tensor): Reconstructions, shape ``(B, C, H, W)``.

    Returns:
        torch.Tensor: Differences in [0, 1], shape ``(B, 1, H, W)``.

    Example:
        >>> images = torch.rand(2, 3, 16, 16)
        >>> gms_difference(images, images).abs().max() < 1e-6
        tensor(True)
    """
    with torch.autocast(images.device.type, enabled=False):
        g, h = (gradient_magnitude(wide(x)) for x in (images, reconstructions))
        similarity = (2 * g * h + _GMS_CONSTANT) / (g**2 + h**2 + _GMS_CONSTANT)
        return 1 - similarity.mean(dim=1, keepdim=True)


def ssim_difference(images: torch.Tensor, reconstructions: torch.Tensor, window: int = SSIM_WINDOW) -> torch.Tensor:
    """Difference map d_s: one minus the structural similarity, mean over channels (sec. 3.4).

    The window is Gaussian (sigma 1.5), by default of 5 x 5 pixels, and the map holds only the pixels whose window lies
    inside the patch: the usual 11 x 11 window would touch padding on 86 % of a 16 x 16 patch.

    Args:
        images (torch.Tensor): Images in [0, 1], shape ``(B, C, H, W)``, sides of at least ``window`` pixels.
        reconstructions (torch.Tensor): Reconstructions, shape ``(B, C, H, W)``.
        window (int): Side of the window in pixels, an odd number.

    Returns:
        torch.Tensor: Differences in [0, 2], shape ``(B, 1, H - window + 1, W - window + 1)``.

    Example:
        >>> ssim_difference(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)).shape
        torch.Size([2, 1, 12, 12])
    """
    with torch.autocast(images.device.type, enabled=False):
        similarity = ssim(wide(images), wide(reconstructions), window, padding="valid")
        return 1 - similarity.mean(dim=1, keepdim=True)


def wide(x: torch.Tensor) -> torch.Tensor:
    """Give a tensor in float32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
