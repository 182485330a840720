# SPDX-License-Identifier: Apache-2.0
"""RIAD in plain float64 loops, written from the paper: inpainting, loss and score."""

import numpy as np
import torch

from ..reference import gms_difference, halved, resized, ssim_difference


def reference_inpainting(model, image, sets):
    """Hide each set of one image, shape (3, H, W), pixel by pixel, and take what the U-Net paints at these pixels."""
    result = np.full(image.shape, np.nan)
    for number in range(3):
        seen = image.copy()
        for y, x in np.ndindex(sets.shape):
            if sets[y, x] == number:
                seen[:, y, x] = 0
        with torch.no_grad():
            painted = model.unet(torch.from_numpy(seen)[None])[0].numpy()
        for y, x in np.ndindex(sets.shape):
            if sets[y, x] == number:
                result[:, y, x] = painted[:, y, x]
    return result


def scales(a, b):
    """The differences at full, half, quarter and eighth scale."""
    maps = [gms_difference(a, b)]
    for _ in range(3):
        a, b = halved(a), halved(b)
        maps.append(gms_difference(a, b))
    return maps


def reference_loss(image, inpainted):
    l2 = ((image - inpainted) ** 2).mean()
    return (
        l2 + np.mean([d.mean() for d in scales(image, inpainted)]) + ssim_difference(image, inpainted, side=11).mean()
    )


def reference_map(image, inpainted):
    """Mean of four scales at full size, then the mean of 21 x 21 pixels, borders reflected."""
    size = image.shape[1:]
    mean = np.pad(sum(resized(d, size) for d in scales(image, inpainted)) / 4, 10, mode="reflect")
    result = np.zeros(size)
    for y, x in np.ndindex(*size):
        result[y, x] = mean[y : y + 21, x : x + 21].mean()
    return result
