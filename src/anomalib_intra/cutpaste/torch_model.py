# SPDX-License-Identifier: Apache-2.0
"""The network that tells the three forms apart, and the scores and maps of its features (sec. 2.3-2.4): pure torch."""

from typing import NamedTuple

import torch
from einops import einsum, rearrange
from timm.models.resnet import resnet18
from torch import nn
from torch.nn.functional import conv_transpose2d, interpolate, pad

from anomalib_intra.components.checkpoint_fit import HOW_TO_CALIBRATE
from anomalib_intra.cutpaste.augmentation import FORMS
from anomalib_intra.cutpaste.gaussian import Gaussian
from anomalib_intra.data.image_range import check_range

#: Dimension D of the pooled features of a ResNet-18, and of the projection that is classified.
FEATURE_DIM, PROJECTED_DIM = 512, 128

#: The smallest images, and the smallest patches: the network makes one feature of 32 x 32 pixels.
SMALLEST_IMAGE, SMALLEST_PATCH = 64, 32

#: Distance between the patches of an image, in pixels.
STRIDE = 4

# More patches at a time need more memory and no less time.
_PATCHES_AT_ONCE = 1024


class Scores(NamedTuple):
    """How anomalous images are, with the names of anomalib's ``InferenceBatch``.

    Args:
        pred_score (torch.Tensor): Of each image, shape ``(B,)``.
        anomaly_map (torch.Tensor): Of its pixels, shape ``(B, 1, H, W)``.
    """

    pred_score: torch.Tensor
    anomaly_map: torch.Tensor


class CutPasteModel(nn.Module):
    """A ResNet-18 from scratch that is trained to tell forms of images apart, and a Gaussian of its normal features.

    Args:
        image_size (tuple[int, int]): Height and width of the images in pixels, at least 64 each.
        patch_size (int | None): Side length K of the patches that are scored, at least 32; None scores whole images.

    Raises:
        ValueError: If the images are too small, or do not hold a patch, or the patches are too small.

    Example:
        >>> model = CutPasteModel((64, 96)).eval()
        >>> model.classify(torch.rand(2, 3, 64, 96)).shape
        torch.Size([2, 3])
    """

    def __init__(self, image_size: tuple[int, int] = (256, 256), patch_size: int | None = None) -> None:
        super().__init__()
        check_sizes(image_size, patch_size)
        self.image_size = image_size
        self.patch_size = patch_size
        self.encoder = resnet18(pretrained=False, num_classes=0, global_pool="")
        self.head = nn.Sequential(
            nn.Linear(FEATURE_DIM, FEATURE_DIM, bias=False),
            nn.BatchNorm1d(FEATURE_DIM),
            nn.ReLU(),
            nn.Linear(FEATURE_DIM, PROJECTED_DIM, bias=False),
            nn.BatchNorm1d(PROJECTED_DIM),
            nn.ReLU(),
            nn.Linear(PROJECTED_DIM, len(FORMS)),
        )
        self.gaussian = Gaussian(FEATURE_DIM)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm1d | nn.BatchNorm2d):
                layer.reset_parameters()
        self.encoder.init_weights()

    # ---- training ----------------------------------------------------------------------------------------------------

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """Tell the form of images or patches.

        Args:
            images (torch.Tensor): Images in [0, 1] of any size, shape ``(B, 3, H, W)``.

        Returns:
            torch.Tensor: Logits of the forms, shape ``(B, 3)``.
        """
        logits: torch.Tensor = self.head(_pooled(self._encode(images)))
        return logits

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        """Map images of shape ``(B, 3, H, W)`` to features at stride 32, ``(B, 512, h, w)``."""
        features: torch.Tensor = self.encoder(2 * images - 1)
        return features

    # ---- scores ------------------------------------------------------------------------------------------------------

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Give the last feature maps of images, or the features of all their patches, in float32.

        Args:
            images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``.

        Returns:
            torch.Tensor: Features of shape ``(B, 512, h, w)``: at stride 32, or one for each patch at stride 4.

        Raises:
            ValueError: If the images are of another size, or hold values that are not finite or not in [0, 1].
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.image_size):
            height, width = self.image_size
            msg = (
                f"Images of shape {tuple(images.shape)} reached a CutPaste for (B, 3, {height}, {width}): resize the "
                "images, or build and train the model with their image_size."
            )
            raise ValueError(msg)
        if not torch.compiler.is_compiling():
            check_range(images)
        # Rounded to bf16, features of normal images would be as far from each other as from those of anomalous ones.
        with torch.autocast(images.device.type, enabled=False):
            if self.patch_size is None:
                return self._encode(images)
            cut = images.unfold(2, self.patch_size, STRIDE).unfold(3, self.patch_size, STRIDE)
            rows, columns = cut.shape[2:4]
            if torch.compiler.is_exporting():  # all at once: the graph would hold the network once for each part
                features = _pooled(self._encode(rearrange(cut, "b c h w k1 k2 -> (b h w) c k1 k2")))
            else:
                of_each = (rearrange(image, "c h w k1 k2 -> (h w) c k1 k2") for image in cut)
                parts = (part for patches in of_each for part in patches.split(_PATCHES_AT_ONCE))
                features = torch.cat([_pooled(self._encode(part)) for part in parts])
            return rearrange(features, "(b h w) d -> b d h w", h=rows, w=columns)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Give what the Gaussian is of: the features of images, or of all their patches.

        Args:
            images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``.

        Returns:
            torch.Tensor: Features of shape ``(B, 512)``, or ``(B * h * w, 512)`` of h x w patches.

        Raises:
            ValueError: If :meth:`encode` refuses the images.
        """
        encoded = self.encode(images)
        return _pooled(encoded) if self.patch_size is None else rearrange(encoded, "b d h w -> (b h w) d")

    def forward(self, images: torch.Tensor) -> Scores:
        """Score images and their pixels.

        Args:
            images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``.

        Returns:
            Scores: Of whole images, the distance from the normal ones and its GradCAM. With patches, the distance of
            the most distant one, and the distances of all spread to the pixels.

        Raises:
            RuntimeError: If there is no Gaussian.
            ValueError: If :meth:`encode` refuses the images.
        """
        if not torch.compiler.is_compiling() and not self.gaussian.is_fitted:
            msg = (
                "This CutPaste has no Gaussian of normal features, so it cannot score images: its training was cut "
                f"off, or it was never trained. {HOW_TO_CALIBRATE}"
            )
            raise RuntimeError(msg)
        encoded = self.encode(images)
        with torch.autocast(images.device.type, enabled=False):
            if self.patch_size is None:
                pooled = _pooled(encoded)
                return Scores(self.gaussian(pooled), grad_cam(encoded, self.gaussian.gradient(pooled), self.image_size))
            rows, columns = encoded.shape[-2:]
            distances = self.gaussian(rearrange(encoded, "b d h w -> (b h w) d"))
            distances = rearrange(distances, "(b h w) -> b 1 h w", h=rows, w=columns)
            spread = spread_to_pixels(distances, self.patch_size, STRIDE, self.image_size)
            return Scores(distances.amax(dim=(1, 2, 3)), spread)


def check_sizes(image_size: tuple[int, int], patch_size: int | None = None) -> None:
    """Refuse images and patches that are too small, and patches that do not fit into the images.

    Args:
        image_size (tuple[int, int]): Height and width of the images in pixels.
        patch_size (int | None): Side length of the patches, if there are some.

    Raises:
        ValueError: If a size does not do.

    Example:
        >>> check_sizes((64, 256), patch_size=16)
        Traceback (most recent call last):
        ...
        ValueError: patch_size must be a whole number from 32 to 64, the shorter side of the images, got 16.
    """
    height, width = image_size
    if min(height, width) < SMALLEST_IMAGE:
        msg = f"Images of {height} x {width} pixels are too small: height and width must be at least {SMALLEST_IMAGE}."
        raise ValueError(msg)
    if patch_size is not None and (
        int(patch_size) != patch_size or not SMALLEST_PATCH <= patch_size <= min(height, width)
    ):
        msg = (
            f"patch_size must be a whole number from {SMALLEST_PATCH} to {min(height, width)}, the shorter side of the "
            f"images, got {patch_size}."
        )
        raise ValueError(msg)


def grad_cam(features: torch.Tensor, gradients: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Show which places of an image make its score (GradCAM, Selvaraju et al., ICCV 2017).

    GradCAM weighs each feature map by the mean gradient of the score. A score of mean features has the same gradient
    everywhere, so that none must be propagated back, and the maps can be exported.

    Args:
        features (torch.Tensor): Feature maps, shape ``(B, D, h, w)``.
        gradients (torch.Tensor): Gradients of the scores by the means of the feature maps, shape ``(B, D)``.
        size (tuple[int, int]): Height and width of the images in pixels.

    Returns:
        torch.Tensor: Maps of at least 0, shape ``(B, 1, H, W)``.

    Example:
        >>> grad_cam(torch.tensor([[[[1.0, -1.0]]]]), torch.tensor([[4.0]]), (1, 2))
        tensor([[[[2., 0.]]]])
    """
    cells = features.shape[-2] * features.shape[-1]
    weighed = einsum(features, gradients / cells, "b d h w, b d -> b h w").relu()[:, None]
    return interpolate(weighed, size=size, mode="bilinear", align_corners=False)


def spread_to_pixels(distances: torch.Tensor, patch_size: int, stride: int, size: tuple[int, int]) -> torch.Tensor:
    """Give every pixel the mean of the patches that hold it, the nearest ones weighing most.

    That is the upsampling by receptive fields of Liznerski et al. (ICLR 2021), a transposed convolution with a
    Gaussian, divided by the weights, so that pixels at the border, which fewer patches hold, are not darker. Pixels at
    the lower and right margin that no patch holds get the value of the nearest pixel that one does.

    Args:
        distances (torch.Tensor): One value for each patch, shape ``(B, 1, h, w)``.
        patch_size (int): Side length K of a patch in pixels; a quarter of it is the Gaussian's standard deviation.
        stride (int): Distance between patches in pixels.
        size (tuple[int, int]): Height and width of the images in pixels.

    Returns:
        torch.Tensor: Maps of shape ``(B, 1, H, W)``.

    Example:
        >>> spread = spread_to_pixels(torch.tensor([[[[1.0, 3.0]]]]), patch_size=2, stride=2, size=(2, 5))
        >>> spread[0, 0, 0].round(decimals=4)
        tensor([1., 1., 3., 3., 3.])
    """
    offset = torch.arange(patch_size, device=distances.device) - (patch_size - 1) / 2
    weight = (-(offset**2) / (2 * (patch_size / 4) ** 2)).exp()
    kernel = torch.outer(weight, weight)[None, None]
    means = conv_transpose2d(distances, kernel, stride=stride)
    means = means / conv_transpose2d(torch.ones_like(distances), kernel, stride=stride)
    return pad(means, (0, size[1] - means.shape[-1], 0, size[0] - means.shape[-2]), mode="replicate")


def _pooled(features: torch.Tensor) -> torch.Tensor:
    return features.mean(dim=(2, 3))
