# SPDX-License-Identifier: Apache-2.0
"""The paper in plain float64 loops: the inpainting transformer, one window at a time, and differences of images."""

import math

import numpy as np
import torch


def linear(layer, x):
    return layer.weight.detach().numpy() @ x + layer.bias.detach().numpy()


def mlp(layers, x):
    hidden = np.array([0.5 * h * (1 + math.erf(h / math.sqrt(2))) for h in linear(layers.fc1, x)])
    return linear(layers.fc2, hidden)


def layer_norm(layer, x):
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    scaled = np.array([(value - mean) / math.sqrt(variance + 1e-5) for value in x])
    return scaled * layer.weight.detach().numpy() + layer.bias.detach().numpy()


def self_attention(module, sequence, attention):
    """Eq. 6-9 ("msa"), or with eq. 10 in place of eq. 6 ("mfsa")."""
    project = linear if attention == "msa" else mlp
    q = [project(module.query, y) for y in sequence]
    k = [project(module.key, y) for y in sequence]
    v = [linear(module.value, y) for y in sequence]
    heads_number = module.num_heads
    head_q, head_v = len(q[0]) // heads_number, len(v[0]) // heads_number
    result = []
    for a in range(len(sequence)):
        heads = []
        for h in range(heads_number):
            part = slice(h * head_q, (h + 1) * head_q)
            weights = [math.exp(q[a][part] @ k[b][part] / math.sqrt(head_q)) for b in range(len(sequence))]
            heads.append(
                sum(weights[b] / sum(weights) * v[b][h * head_v : (h + 1) * head_v] for b in range(len(sequence)))
            )
        result.append(linear(module.unify, np.concatenate(heads)))
    return result


def reference_inpaint(model, patches, r, s, t, u, attention, position, readout, long_residuals):
    """Inpaint (t, u) from the window at (r, s) of a grid of patches, shape (N, M, K * K * 3); all 1-based."""
    L, M = model.window_size, patches.shape[1]
    embedding = model.patch_embedding.weight.detach().numpy().T
    posemb = model.position_embedding.detach().numpy()

    def f(i, j):
        return (i - r) * L + j - s + 1 if position == "local" else (i - 1) * M + j

    z = model.inpaint_embedding.detach().numpy() + posemb[f(t, u) - 1]  # eq. 4
    sequence = [z]  # eq. 5: the patch to inpaint comes first
    for i in range(r, r + L):
        for j in range(s, s + L):
            if (i, j) != (t, u):
                sequence.append(patches[i - 1, j - 1] @ embedding + posemb[f(i, j) - 1])  # eq. 3

    n = len(model.blocks)
    source_of = {n - 1 - i: i for i in range((n - 1) // 2)} if long_residuals else {}
    outputs = []
    for number, block in enumerate(model.blocks):
        if number in source_of:
            sequence = [y + early for y, early in zip(sequence, outputs[source_of[number]], strict=True)]
        attended = self_attention(block.attention, [layer_norm(block.norm1, y) for y in sequence], attention)
        sequence = [y + a for y, a in zip(sequence, attended, strict=True)]
        sequence = [y + mlp(block.mlp, layer_norm(block.norm2, y)) for y in sequence]
        outputs.append(sequence)

    vector = sum(sequence) / len(sequence) if readout == "mean" else sequence[0]
    return linear(model.to_pixels, vector)


def reference_patches(image, K):
    """Patches of K x K pixels of one image, elements ordered row, column, channel."""
    _, height, width = image.shape
    patches = np.zeros((height // K, width // K, K * K * 3))
    for y in range(height):
        for x in range(width):
            for c in range(3):
                patches[y // K, x // K, ((y % K) * K + x % K) * 3 + c] = image[c, y, x]
    return patches


def reference_origin(c, length, L):
    g = max(1, c - L // 2)
    return g - max(0, g + L - length - 1)


def reference_reconstruct(model, image, attention, position, readout, long_residuals):
    """Reconstruct one image, shape (3, H, W), patch by patch from the most central window."""
    K, L = model.patch_size, model.window_size
    patches = reference_patches(image, K)
    rows, columns = patches.shape[:2]
    result = np.zeros_like(image)
    for t in range(1, rows + 1):
        for u in range(1, columns + 1):
            r, s = reference_origin(t, rows, L), reference_origin(u, columns, L)
            patch = reference_inpaint(model, patches, r, s, t, u, attention, position, readout, long_residuals)
            where = (slice(None), slice((t - 1) * K, t * K), slice((u - 1) * K, u * K))
            result[where] = patch.reshape(K, K, 3).transpose(2, 0, 1)
    return result


def far_from_zero(model, seed):
    """Draw all parameters of a model so that each of them shows in what it gives."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.4)


# ---- differences of images -------------------------------------------------------------------------------------------


def gradient(channel):
    """Prewitt / 3 in both directions, borders replicated, (H, W) to (H, W)."""
    padded = np.pad(channel.astype(float), 1, mode="edge")
    magnitude = np.zeros(channel.shape)
    for y, x in np.ndindex(*channel.shape):
        around = padded[y : y + 3, x : x + 3]
        across, down = (around[:, 0] - around[:, 2]).sum() / 3, (around[0] - around[2]).sum() / 3
        magnitude[y, x] = math.hypot(across, down)
    return magnitude


def gms_difference(image, other):
    """Eq. 11, (C, H, W) to (H, W)."""
    c = 170 / 255**2
    gradients = [(gradient(one), gradient(another)) for one, another in zip(image, other, strict=True)]
    return 1 - sum((2 * g * h + c) / (g**2 + h**2 + c) for g, h in gradients) / len(gradients)


def ssim_difference(image, other, side=5):
    """One minus SSIM, mean over channels, where the Gaussian window lies inside, (C, H, W) to a smaller map."""
    image, other = image.astype(float), other.astype(float)
    c1, c2 = 0.01**2, 0.03**2
    offsets = range(-(side // 2), side // 2 + 1)
    weights = np.array([[math.exp(-(a**2 + b**2) / (2 * 1.5**2)) for b in offsets] for a in offsets])
    weights = weights / weights.sum()
    result = np.zeros((image.shape[1] - side + 1, image.shape[2] - side + 1))
    for y, x in np.ndindex(*result.shape):
        windows = (a[:, y : y + side, x : x + side] for a in (image, other))
        similarities = []
        for p, q in zip(*windows, strict=True):
            mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
            var_p, var_q = (weights * (p - mean_p) ** 2).sum(), (weights * (q - mean_q) ** 2).sum()
            cov = (weights * (p - mean_p) * (q - mean_q)).sum()
            top = (2 * mean_p * mean_q + c1) * (2 * cov + c2)
            similarities.append(top / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2)))
        result[y, x] = 1 - sum(similarities) / len(similarities)
    return result


def halved(image):
    """Means of 2 x 2 pixels, (..., H, W) to (..., H / 2, W / 2)."""
    return sum(image[..., i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4


def resized(channel, size):
    """Bilinear interpolation between the centres of pixels, (h, w) to size."""
    result = np.zeros(size)
    for place in np.ndindex(*size):
        at = [max(0.0, (n + 0.5) * s / S - 0.5) for n, s, S in zip(place, channel.shape, size, strict=True)]
        (i, j), (u, v) = [int(p) for p in at], [p - int(p) for p in at]
        k, m = min(i + 1, channel.shape[0] - 1), min(j + 1, channel.shape[1] - 1)
        upper = (1 - v) * channel[i, j] + v * channel[i, m]
        lower = (1 - v) * channel[k, j] + v * channel[k, m]
        result[place] = (1 - u) * upper + u * lower
    return result
