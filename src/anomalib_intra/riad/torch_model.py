# SPDX-License-Identifier: Apache-2.0
"""A U-Net that inpaints an image set by set of hidden cells: pure torch."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from einops import rearrange
from torch import nn
from torchvision.ops import Conv2dNormActivation

from anomalib_intra.components.arguments import check_counts
from anomalib_intra.data.image_range import as_colour, check_range
from anomalib_intra.riad.masks import SETS, check_cells, draw_sets

#: Channels of the U-Net at each of its scales, as multiples of its width.
_CHANNELS = (1, 2, 4, 8, 8)
_STRIDE = 2 ** (len(_CHANNELS) - 1)
#: Seed of the masks of inference.
_SEED = 0


class Inpainting(NamedTuple):
    """What the model gives for a batch of images, once for each of R cell sizes.

    Args:
        image (torch.Tensor): The images it saw, in [0, 1], shape ``(B, 3, H, W)``.
        inpainted (torch.Tensor): The images it expected, in [0, 1], shape ``(B, R, 3, H, W)``.
    """

    image: torch.Tensor
    inpainted: torch.Tensor


class UpBlock(nn.Module):
    """Doubles the size of features and joins them with those of the encoder at that size.

    Args:
        inputs (int): Channels of the coarser features.
        outputs (int): Channels of the encoder's, and of the result.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose2d(inputs, outputs, kernel_size=4, stride=2, padding=1)
        self.join = nn.Sequential(Conv2dNormActivation(2 * outputs, outputs), Conv2dNormActivation(outputs, outputs))

    def forward(self, coarse: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
        """Map features ``(B, inputs, h, w)`` and ``(B, outputs, 2 * h, 2 * w)`` to ``(B, outputs, 2 * h, 2 * w)``."""
        joined: torch.Tensor = self.join(torch.cat([self.upsample(coarse), skipped], dim=1))
        return joined


class UNet(nn.Module):
    """Encoder and decoder with four stages of stride 2, batch norm and skip connections.

    Args:
        width (int): Channels at full size; 2, 4, 8 and 8 times as many at the coarser ones.

    Example:
        >>> UNet(width=4)(torch.rand(2, 3, 32, 48)).shape
        torch.Size([2, 3, 32, 48])
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        channels = [factor * width for factor in _CHANNELS]
        self.down = nn.ModuleList([nn.Sequential(Conv2dNormActivation(3, width), Conv2dNormActivation(width, width))])
        for inputs, outputs in pairwise(channels):
            halve = Conv2dNormActivation(inputs, outputs, kernel_size=4, stride=2)
            self.down.append(nn.Sequential(halve, Conv2dNormActivation(outputs, outputs)))
        self.up = nn.ModuleList(UpBlock(inputs, outputs) for inputs, outputs in pairwise(reversed(channels)))
        self.to_pixels = nn.Conv2d(width, 3, kernel_size=3, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images in [0, 1], shape ``(B, 3, H, W)``, to images in [0, 1] of the same shape."""
        features = [images]
        for block in self.down:
            features.append(block(features[-1]))
        x = features.pop()
        for block in self.up:
            x = block(x, features.pop())
        # A sigmoid in bf16 would round pixels more coarsely than a byte does.
        return torch.sigmoid(self.to_pixels(x).to(images.dtype))


class RIADModel(nn.Module):
    """Hides an image set by set of cells, inpaints what is hidden, and puts the inpainted parts together.

    The sets are drawn once, from a seed of their own, and stay with the weights, so that an image has the same score
    each time. Needs neither Lightning nor anomalib.

    Args:
        image_size (tuple[int, int]): Height and width of the images in pixels; the masks tie the model to it.
        cell_sizes (Sequence[int]): Side lengths k of the cells in pixels, R of them.
        width (int): Channels of the U-Net at full size.

    Raises:
        ValueError: If sizes do not fit together.

    Example:
        >>> model = RIADModel((32, 48), width=4).eval()
        >>> model(torch.rand(2, 3, 32, 48)).inpainted.shape
        torch.Size([2, 4, 3, 32, 48])
    """

    sets: torch.Tensor

    def __init__(
        self, image_size: tuple[int, int] = (256, 256), cell_sizes: Sequence[int] = (2, 4, 8, 16), width: int = 64
    ) -> None:
        super().__init__()
        check_counts(width=width)
        check_cells(image_size, cell_sizes, _STRIDE)
        self.image_size = image_size
        self.cell_sizes = tuple(cell_sizes)
        self.unet = UNet(width)
        generator = torch.Generator().manual_seed(_SEED)
        self.register_buffer("sets", torch.stack([draw_sets(image_size, k, generator) for k in self.cell_sizes]))

    def reset_parameters(self) -> None:
        """Initialise all weights anew, with the defaults of PyTorch."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
                layer.reset_parameters()

    def forward(self, images: torch.Tensor) -> Inpainting:
        """Inpaint images once with cells of each size, always the same ones.

        Args:
            images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``, or ``(B, 1, H, W)``, which is taken as
                three equal channels.

        Returns:
            Inpainting: The images in three channels, and what the model expected.

        Raises:
            ValueError: If the images have another shape, size or range.
        """
        images = as_colour(images)
        self._check(images)
        # One cell size after the other takes less memory, but a graph would hold the U-Net once for each.
        at_once = len(self.sets) if torch.compiler.is_compiling() else 1
        inpainted = [self.inpaint(images, sets) for sets in self.sets.split(at_once)]
        return Inpainting(images, torch.cat(inpainted, dim=1))

    def inpaint(self, images: torch.Tensor, sets: torch.Tensor) -> torch.Tensor:
        """Hide one set of cells in each of three copies of an image, and put together what is painted there.

        Args:
            images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``.
            sets (torch.Tensor): R times the number of each pixel's set, as :func:`draw_sets` gives it, shape
                ``(R, H, W)``.

        Returns:
            torch.Tensor: Inpainted images in [0, 1], shape ``(B, R, 3, H, W)``.
        """
        numbers = torch.arange(SETS, device=sets.device)
        hidden = rearrange(sets, "r h w -> r 1 1 h w") == rearrange(numbers, "s -> s 1 1 1")
        seen = rearrange(images, "b c h w -> b 1 1 c h w") * ~hidden
        painted = self.unet(rearrange(seen, "b r s c h w -> (b r s) c h w"))
        painted = rearrange(painted, "(b r s) c h w -> b r s c h w", r=len(sets), s=SETS)
        return (painted * hidden).sum(dim=2)

    def _check(self, images: torch.Tensor) -> None:
        height, width = images.shape[-2:]
        if (height, width) != self.image_size:
            msg = (
                f"Images of {height} x {width} pixels reached a model whose masks are for {self.image_size[0]} x "
                f"{self.image_size[1]}: resize the images, or build the model with image_size=({height}, {width})."
            )
            raise ValueError(msg)
        if not torch.compiler.is_compiling():
            check_range(images)
