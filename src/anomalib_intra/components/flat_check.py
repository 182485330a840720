# SPDX-License-Identifier: Apache-2.0
"""Whether reconstructions are better than a flat image: the first sign of life of a training run."""

import torch
from einops import reduce


class FlatCheck:
    """Collects the error of reconstructions and that of a flat image in the images' mean colour.

    Example:
        >>> check = FlatCheck()
        >>> images = torch.rand(2, 3, 8, 8)
        >>> check.update(images, images)
        >>> error, flat = check.compute()
        >>> error, flat > 0
        (0.0, True)
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._pixels = 0
        self._moments: list[torch.Tensor] | None = None

    def update(self, images: torch.Tensor, reconstructions: torch.Tensor) -> None:
        """Add images and their reconstructions.

        Args:
            images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``.
            reconstructions (torch.Tensor): Reconstructions, shape ``(B, 3, H, W)``.
        """
        squared_error = (images - reconstructions) ** 2
        # On the CPU in float64, which not every accelerator has.
        moments = [reduce(x, "b c h w -> c", "sum").cpu().double() for x in (squared_error, images, images**2)]
        self._moments = [a + b for a, b in zip(self._moments, moments, strict=True)] if self._moments else moments
        self._pixels += images.shape[0] * images.shape[-2] * images.shape[-1]

    def compute(self) -> tuple[float, float]:
        """Compare both.

        Returns:
            tuple[float, float]: Mean squared error of the reconstructions and of the flat image (0 and 0 without
            images).
        """
        if self._moments is None:
            return 0.0, 0.0
        squared_error, first, second = (moment / self._pixels for moment in self._moments)
        return float(squared_error.mean()), float((second - first**2).mean())
