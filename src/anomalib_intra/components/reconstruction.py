# SPDX-License-Identifier: Apache-2.0
"""What models that paint an image again give, and what it is scored by."""

from typing import NamedTuple

import torch


class Reconstruction(NamedTuple):
    """What a torch model gives for a batch of images.

    Args:
        image (torch.Tensor): The images it saw, in [0, 1], shape ``(B, 3, H, W)``.
        reconstruction (torch.Tensor): The images it expected, shape ``(B, 3, H, W)``.
    """

    image: torch.Tensor
    reconstruction: torch.Tensor


class Comparison(NamedTuple):
    """Images, what was expected, and how much both differ.

    Args:
        image (torch.Tensor): The images, in [0, 1], shape ``(B, 3, H, W)``.
        reconstruction (torch.Tensor): The images that were expected, shape ``(B, 3, H, W)``.
        difference (torch.Tensor): Difference maps, such as those of eq. 16, shape ``(B, 1, H, W)``.
    """

    image: torch.Tensor
    reconstruction: torch.Tensor
    difference: torch.Tensor
