# SPDX-License-Identifier: Apache-2.0
"""RIAD in plain float64 loops, written from the paper: inpainting, loss and score."""

import numpy as np
import torch


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


def halved(image):
    """Means of 2 x 2 pixels, (C, H, W) to (C, H / 2, W / 2)."""
    return sum(image[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4


def gradient(channel):
    """Prewitt gradient magnitude of (H, W), borders replicated."""
    height, width = channel.shape
    padded = np.pad(channel, 1, mode="edge")
    result = np.zeros_like(channel)
    for y, x in np.ndindex(height, width):
        around = padded[y : y + 3, x : x + 3]
        horizontal, vertical = (around[:, 0] - around[:, 2]).sum() / 3, (around[0] - around[2]).sum() / 3
        result[y, x] = np.sqrt(horizontal**2 + vertical**2 + 1e-12)
    return result


def gms_difference(a, b):
    """One minus the GMS, mean over channels, (C, H, W) to (H, W)."""
    c = 170 / 255**2
    gradients = [(gradient(p), gradient(q)) for p, q in zip(a, b, strict=True)]
    return 1 - np.mean([(2 * g * h + c) / (g**2 + h**2 + c) for g, h in gradients], axis=0)


def scales(a, b):
    """The differences at full, half, quarter and eighth scale."""
    maps = [gms_difference(a, b)]
    for _ in range(3):
        a, b = halved(a), halved(b)
        maps.append(gms_difference(a, b))
    return maps


def ssim(a, b):
    """Mean SSIM over channels and all 11 x 11 Gaussian windows inside the image, for values in [0, 1]."""
    taps = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(taps, taps) / taps.sum() ** 2
    values = []
    for p_all, q_all in zip(a, b, strict=True):
        for y, x in np.ndindex(p_all.shape[0] - 10, p_all.shape[1] - 10):
            p, q = p_all[y : y + 11, x : x + 11], q_all[y : y + 11, x : x + 11]
            mean_p, mean_q = (window * p).sum(), (window * q).sum()
            var_p, var_q = (window * p**2).sum() - mean_p**2, (window * q**2).sum() - mean_q**2
            cov = (window * p * q).sum() - mean_p * mean_q
            top = (2 * mean_p * mean_q + 0.01**2) * (2 * cov + 0.03**2)
            values.append(top / ((mean_p**2 + mean_q**2 + 0.01**2) * (var_p + var_q + 0.03**2)))
    return np.mean(values)


def reference_loss(image, inpainted):
    l2 = ((image - inpainted) ** 2).mean()
    return l2 + np.mean([d.mean() for d in scales(image, inpainted)]) + 1 - ssim(image, inpainted)


def enlarged(channel, size):
    """Bilinear interpolation between the centres of pixels, (h, w) to size."""
    result = np.zeros(size)
    for y, x in np.ndindex(*size):
        at = [(n + 0.5) * s / S - 0.5 for n, s, S in zip((y, x), channel.shape, size, strict=True)]
        at = [max(0.0, p) for p in at]
        (i, j), (u, v) = [int(p) for p in at], [p - int(p) for p in at]
        k, m = min(i + 1, channel.shape[0] - 1), min(j + 1, channel.shape[1] - 1)
        upper = (1 - v) * channel[i, j] + v * channel[i, m]
        lower = (1 - v) * channel[k, j] + v * channel[k, m]
        result[y, x] = (1 - u) * upper + u * lower
    return result


def reference_map(image, inpainted):
    """Mean of four scales at full size, then the mean of 21 x 21 pixels, borders reflected."""
    size = image.shape[1:]
    mean = np.pad(sum(enlarged(d, size) for d in scales(image, inpainted)) / 4, 10, mode="reflect")
    result = np.zeros(size)
    for y, x in np.ndindex(*size):
        result[y, x] = mean[y : y + 21, x : x + 21].mean()
    return result
