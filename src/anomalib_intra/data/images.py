# SPDX-License-Identifier: Apache-2.0
"""Whole images as training samples."""

from dataclasses import dataclass

import torch

from anomalib_intra.data.samples import as_fractions
from anomalib_intra.data.symmetries import Symmetries, apply_symmetries, sample_symmetries


@dataclass(kw_only=True)
class ImageSamples(Symmetries):
    """The images of one training step, not yet flipped and turned.

    Args:
        image (torch.Tensor): The images they are among, as bytes or in [0, 1], shape ``(P, 3, H, W)``.
        index (torch.Tensor): Which image, shape ``(B,)``.
    """

    image: torch.Tensor
    index: torch.Tensor

    def __len__(self) -> int:
        """Number of images."""
        return len(self.index)


def sample_images(
    images: torch.Tensor, samples_per_image: int, generator: torch.Generator, augment: bool = True
) -> ImageSamples:
    """Take every image several times, in random order, flipped and turned at random.

    Args:
        images (torch.Tensor): Images, as bytes or in [0, 1], shape ``(P, 3, H, W)``.
        samples_per_image (int): How often each is taken.
        generator (torch.Generator): Source of randomness, on the CPU.
        augment (bool): Flip and turn; images that are not square are only flipped.

    Returns:
        ImageSamples: All ``P * samples_per_image`` samples.

    Example:
        >>> samples = sample_images(torch.rand(2, 3, 8, 8), 5, torch.Generator().manual_seed(0))
        >>> len(samples), cut_images(samples).shape
        (10, torch.Size([10, 3, 8, 8]))
    """
    count = len(images) * samples_per_image
    return ImageSamples(
        image=images,
        index=torch.randperm(count, generator=generator) % len(images),
        **sample_symmetries(count, images.shape[-1] == images.shape[-2], augment, generator),
    )


def cut_images(batch: ImageSamples) -> torch.Tensor:
    """Give the images of a step, on whatever device they are.

    Args:
        batch (ImageSamples): Images and samples.

    Returns:
        torch.Tensor: Images in [0, 1], shape ``(B, 3, H, W)``.
    """
    return apply_symmetries(as_fractions(batch.image[batch.index]), batch)
