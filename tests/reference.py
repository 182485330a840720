# SPDX-License-Identifier: Apache-2.0
"""The inpainting transformer in plain float64 loops, one window at a time, written from the paper."""

import math

import numpy as np


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
