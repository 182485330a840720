# SPDX-License-Identifier: Apache-2.0
"""From image and reconstruction to anomaly map and score (sec. 3.5, eq. 16-18): pure torch."""

from typing import Literal, TypeAlias

import torch
from kornia.filters import box_blur, gaussian_blur2d
from torch.nn.functional import interpolate, softplus

from anomalib_intra.components.similarity import colour_difference, gms_difference

#: How a difference map is compared with those of the training images: see :func:`anomaly_map`.
Deviation: TypeAlias = Literal["squared", "positive", "scaled", "half", "raw"]

#: Kernel sizes of averaging and Gaussian blur at half and quarter scale for an image size of 512 (sec. 4.1).
_KERNELS_AT_512 = (21, 11)
_SIGMA = (2.0, 2.0)
_SMALLEST_STD = 1e-12


def difference_map(images: torch.Tensor, reconstructions: torch.Tensor, colour_weight: float = 0.0) -> torch.Tensor:
    """Gradient magnitude difference at half and quarter scale, smoothed, mean of both (eq. 16).

    Args:
        images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``.
        reconstructions (torch.Tensor): Reconstructions, shape ``(B, 3, H, W)``.
        colour_weight (float): Weight in [0, 1] of a colour difference beside it, which is not in the paper.

    Returns:
        torch.Tensor: Difference maps in [0, 1], shape ``(B, 1, H, W)``, in float32.

    Example:
        >>> difference_map(torch.rand(1, 3, 64, 96), torch.rand(1, 3, 64, 96)).shape
        torch.Size([1, 1, 64, 96])
    """
    size = images.shape[-2:]
    maps = []
    with torch.autocast(images.device.type, enabled=False):
        x, y = images.float(), reconstructions.float()
        for kernel_at_512 in _KERNELS_AT_512:
            # Each scale halves the one before: at once to a quarter, bilinear resizing reads 4 of 16 pixels.
            x, y = halve(x), halve(y)
            difference = gms_difference(x, y)
            if colour_weight:
                difference = torch.lerp(difference, colour_difference(x, y.clamp(0, 1)), colour_weight)
            kernel = _scaled_kernel(kernel_at_512, min(size))
            smooth = gaussian_blur2d(box_blur(difference, kernel), kernel, _SIGMA)
            maps.append(interpolate(smooth, size=size, mode="bilinear", align_corners=False))
    return torch.stack(maps).mean(dim=0)


def anomaly_map(
    differences: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, deviation: Deviation = "squared"
) -> torch.Tensor:
    """Squared deviation of difference maps from those of the training images (eq. 17).

    Args:
        differences (torch.Tensor): Difference maps, shape ``(B, 1, H, W)``.
        mean (torch.Tensor): Mean of the training images' difference maps, shape ``(1, 1, H, W)``.
        std (torch.Tensor): Their standard deviation, of the same shape; only ``"scaled"`` asks for it.
        deviation (str): ``"squared"`` is eq. 17; ``"positive"`` counts only what differs more than in the training
            images; ``"scaled"`` divides by the standard deviation, drawn half way towards its mean over all pixels;
            ``"half"`` is for maps of logits, which may be negative: it takes off half the mean and makes the rest
            positive by a softplus; ``"raw"`` takes the difference maps as they are.

    Returns:
        torch.Tensor: Anomaly maps, shape ``(B, 1, H, W)``; in [0, 1] but for ``"scaled"`` and ``"half"``.

    Example:
        >>> anomaly_map(torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)).unique()
        tensor([0.2500])
    """
    if deviation == "raw":
        return differences
    if deviation == "half":
        return softplus(differences - mean / 2)
    difference = differences - mean
    if deviation == "positive":
        difference = difference.clamp(min=0)
    elif deviation == "scaled":
        # Without the mean, a pixel at which all training images happen to be alike would decide everything.
        usual = std.mean()
        difference = difference * 2 * usual / (std + usual + _SMALLEST_STD)
    return difference**2


def image_score(anomaly_maps: torch.Tensor, share: float = 0.0) -> torch.Tensor:
    """The maximum of each anomaly map (eq. 18), or the mean of its highest values.

    Args:
        anomaly_maps (torch.Tensor): Anomaly maps, shape ``(B, 1, H, W)``.
        share (float): Share of the pixels whose mean it is, in [0, 1], at least one pixel; 0 is eq. 18. The mean of a
            few hundred pixels is not set by one speck of dust.

    Returns:
        torch.Tensor: Scores, shape ``(B,)``.

    Example:
        >>> maps = torch.arange(8.0).reshape(2, 1, 2, 2)
        >>> image_score(maps), image_score(maps, share=0.5)
        (tensor([3., 7.]), tensor([2.5000, 6.5000]))
    """
    values = anomaly_maps.flatten(start_dim=1)
    if share == 0:
        return values.amax(dim=1)
    return values.topk(max(1, round(share * values.shape[1])), dim=1).values.mean(dim=1)


def halve(images: torch.Tensor) -> torch.Tensor:
    """Bring images to half their size, by the means of 2 x 2 pixels.

    Args:
        images (torch.Tensor): Images of shape ``(B, C, H, W)``.

    Returns:
        torch.Tensor: Images of shape ``(B, C, H // 2, W // 2)``, at least 1 x 1.

    Example:
        >>> halve(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])).item()
        2.5
    """
    size = [max(1, side // 2) for side in images.shape[-2:]]
    return interpolate(images, size=size, mode="bilinear", align_corners=False)


def _scaled_kernel(at_512: int, size: int) -> int:
    """Scale a kernel size linearly with the image size, to the nearest odd number of at least 3."""
    return max(3, 2 * round((at_512 * size / 512 - 1) / 2) + 1)
