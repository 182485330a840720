# SPDX-License-Identifier: Apache-2.0
"""The one-pass transformer in plain float64 loops, one patch at a time, written from the equations."""

import math

import numpy as np

from ..reference import layer_norm, linear, mlp, reference_patches


def array(x):
    return x.detach().numpy()


def reference_one_pass(model, image, radius):
    """Inpaint every patch of one image, shape (3, H, W)."""
    K, S, heads = model.patch_size, model.block_size, model.num_heads
    mean, std = (array(x)[:, None, None] for x in (model.channel_mean, model.channel_std))
    patches = reference_patches((image - mean) / std, K)
    N, M, _ = patches.shape
    block_rows, block_columns = math.ceil(N / S), math.ceil(M / S)
    D = len(model.inpaint_embedding)
    head_dim = D // heads

    def position(i, j):
        return array(model.position_embedding)[(i // S) * block_columns + j // S, (i % S) * S + j % S]

    # Content: each patch alone.
    content = {}
    for i, j in np.ndindex(N, M):
        c = array(model.patch_embedding.weight) @ patches[i, j] + position(i, j)  # eq. 3
        for block in model.content_blocks:
            c = c + mlp(block.mlp, layer_norm(block.norm, c))
        content[i, j] = layer_norm(model.content_norm, c)
    near = {place: linear(model.near_key_value, c) for place, c in content.items()}
    far = {}
    for block in np.ndindex(block_rows, block_columns):
        members = [c for (i, j), c in content.items() if (i // S, j // S) == block]
        far[block] = linear(model.far_key_value, sum(members) / len(members))

    painted = np.zeros_like(patches)
    for t, u in np.ndindex(N, M):
        number = model.radii.index(radius)
        y = array(model.inpaint_embedding) + position(t, u) + array(model.radius_embedding)[number]  # eq. 4
        for n, block in enumerate(model.blocks):
            q = linear(block.attention.query, layer_norm(block.norm1, y))
            attended = []
            for h in range(heads):
                part = slice(h * head_dim, (h + 1) * head_dim)
                scores, values = [], []

                def see(both, bias, n=n, part=part, q=q, scores=scores, values=values):
                    key, value = both[2 * n * D : (2 * n + 1) * D], both[(2 * n + 1) * D : (2 * n + 2) * D]
                    scores.append(q[part] @ key[part] / math.sqrt(head_dim) + bias[n * heads + part.start // head_dim])
                    values.append(value[part])

                for (i, j), both in near.items():
                    if max(abs(i // S - t // S), abs(j // S - u // S)) <= 1 and max(abs(i - t), abs(j - u)) > radius:
                        offset = (t - i + 2 * S - 1) * (4 * S - 1) + u - j + 2 * S - 1
                        see(both, array(model.near_bias)[offset])
                for (i, j), both in far.items():
                    if max(abs(i - t // S), abs(j - u // S)) > 1:
                        offset = (
                            (t // S - i + block_rows - 1) * (2 * block_columns - 1) + u // S - j + block_columns - 1
                        )
                        see(both, array(model.far_bias)[offset])
                weights = np.exp(np.array(scores) - max(scores))
                attended.append(weights / weights.sum() @ np.array(values))
            y = y + linear(block.attention.unify, np.concatenate(attended))
            y = y + mlp(block.mlp, layer_norm(block.norm2, y))
        painted[t, u] = linear(model.to_pixels, layer_norm(model.norm, y))

    result = np.zeros(image.shape)
    for t, u in np.ndindex(N, M):
        result[:, t * K : (t + 1) * K, u * K : (u + 1) * K] = painted[t, u].reshape(K, K, 3).transpose(2, 0, 1)
    return result * std + mean
