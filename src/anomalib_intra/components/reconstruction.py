# SPDX-License-Identifier: Apache-2.0
"""What every model that paints an image again gives."""

from typing import NamedTuple

import torch


class Reconstruction(NamedTuple):
    """What the model gives for a batch of images.

    Args:
        image (torch.Tensor): The images it saw, in [0, 1], shape ``(B, 3, H, W)``.
        reconstruction (torch.Tensor): The images it expected, shape ``(B, 3, H, W)``.
    """

    image: torch.Tensor
    reconstruction: torch.Tensor
