# SPDX-License-Identifier: Apache-2.0
"""MSA (eq. 6-9) and MFSA (eq. 10) against loops over heads and positions in float64."""

import math

import numpy as np
import pytest
import torch

from anomalib_intra.intra.attention import MultiheadFeatureSelfAttention, MultiheadSelfAttention, _attend


def randomise(module, seed):
    # Large weights, so that the softmax is far from uniform and every bias counts.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module.double()


def linear(layer, x):
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    return [sum(x[d] * weight[o][d] for d in range(len(x))) + bias[o] for o in range(len(weight))]


def mlp(layers, x):
    hidden = [0.5 * h * (1 + math.erf(h / math.sqrt(2))) for h in linear(layers.fc1, x)]
    return linear(layers.fc2, hidden)


def attend(q, k, v, heads, scale):
    """Eq. 7 and 8 for each head, concatenated."""
    length, width_k, width_v = len(q), len(q[0]) // heads, len(v[0]) // heads
    out = [[0.0] * len(v[0]) for _ in range(length)]
    for h in range(heads):
        for a in range(length):
            logits = []
            for b in range(length):
                dot = sum(q[a][h * width_k + d] * k[b][h * width_k + d] for d in range(width_k))
                logits.append(dot / math.sqrt(scale))
            highest = max(logits)
            weights = [math.exp(logit - highest) for logit in logits]
            for b in range(length):
                for d in range(width_v):
                    out[a][h * width_v + d] += weights[b] / sum(weights) * v[b][h * width_v + d]
    return out


def reference_msa(module, y, heads):
    q = [linear(module.query, x) for x in y]
    k = [linear(module.key, x) for x in y]
    v = [linear(module.value, x) for x in y]
    return [linear(module.unify, z) for z in attend(q, k, v, heads, scale=len(y[0]) // heads)]


def reference_mfsa(module, y, heads, scale):
    q = [mlp(module.query, x) for x in y]
    k = [mlp(module.key, x) for x in y]
    v = [linear(module.value, x) for x in y]
    return [linear(module.unify, z) for z in attend(q, k, v, heads, scale)]


def sequences(seed, embed_dim):
    return torch.randn(2, 9, embed_dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("embed_dim", "heads"), [(8, 1), (8, 2), (12, 4)])
def test_msa_equals_loops_over_eq_6_to_9(embed_dim, heads):
    module = randomise(MultiheadSelfAttention(embed_dim, heads), seed=0)
    y = sequences(1, embed_dim)
    got = module(y).detach().numpy()
    for b in range(len(y)):
        np.testing.assert_allclose(got[b], reference_msa(module, y[b].tolist(), heads), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("embed_dim", "heads", "feature_dim"), [(8, 1, 4), (8, 2, 4), (12, 4, 8), (8, 2, 12)])
def test_mfsa_equals_loops_over_eq_10_and_7_to_9(embed_dim, heads, feature_dim):
    module = randomise(MultiheadFeatureSelfAttention(embed_dim, heads, feature_dim), seed=2)
    y = sequences(3, embed_dim)
    got = module(y).detach().numpy()
    for b in range(len(y)):
        expected = reference_mfsa(module, y[b].tolist(), heads, scale=feature_dim // heads)
        np.testing.assert_allclose(got[b], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("feature_dim", [32, 64])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_on_a_cpu_attends_and_trains_as_exactly_as_the_kernel_does(feature_dim, autocast):
    # There, eq. 7 and 8 are written out, since the fast kernel is not fast.
    heads, generator = 4, torch.Generator().manual_seed(8)
    # Queries and keys are large, so that the softmax is sharp and errors of its logits count.
    q, k = (3 * torch.randn(16, heads, 25, feature_dim // heads, generator=generator) for _ in range(2))
    v = torch.randn(16, heads, 25, 16, generator=generator)

    def outputs_and_gradients(attend, dtype):
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
            z = attend(*leaves)
        assert z.dtype == dtype
        z.sum(dim=(1, 2)).square().sum().backward()
        return [z.double(), *(leaf.grad.double() for leaf in leaves)]

    def errors(results):
        return [(x - y).square().mean().sqrt() / y.square().mean().sqrt() for x, y in zip(results, exact, strict=True)]

    def kernel(q, k, v):
        scale = q.shape[-1] ** -0.5
        q, k = (torch.nn.functional.pad(x, (0, v.shape[-1] - x.shape[-1])) for x in (q, k))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)

    exact = outputs_and_gradients(_attend, torch.float64)
    of_the_kernel = errors(outputs_and_gradients(kernel, torch.bfloat16))
    for ours, kernels in zip(errors(outputs_and_gradients(_attend, torch.bfloat16)), of_the_kernel, strict=True):
        assert 0 < ours < 1.5 * kernels


def test_mfsa_scales_by_the_head_dimension_of_the_features_not_of_the_latent_space():
    embed_dim, heads, feature_dim = 16, 2, 4
    module = randomise(MultiheadFeatureSelfAttention(embed_dim, heads, feature_dim), seed=4)
    y = sequences(5, embed_dim)
    got = module(y).detach().numpy()[0]
    features = np.array(reference_mfsa(module, y[0].tolist(), heads, scale=feature_dim // heads))
    latent = np.array(reference_mfsa(module, y[0].tolist(), heads, scale=embed_dim // heads))
    assert np.abs(got - features).max() < 1e-10
    assert np.abs(got - latent).max() > 1e-2


def test_mfsa_mlps_have_one_hidden_layer_of_twice_the_latent_dimension():
    module = MultiheadFeatureSelfAttention(embed_dim=8, num_heads=2, feature_dim=4)
    for layers in (module.query, module.key):
        shapes = [tuple(parameter.shape) for parameter in layers.parameters()]
        assert shapes == [(16, 8), (16,), (4, 16), (4,)]
    assert not torch.equal(module.query.fc1.weight, module.key.fc1.weight)


def test_attention_does_not_see_the_order_of_the_sequence():
    # What lets the hidden patch stay at its place instead of moving to the front (eq. 5).
    order = torch.tensor([4, 0, 1, 2, 3, 8, 7, 6, 5])
    y = sequences(6, 8)
    for module in (MultiheadSelfAttention(8, 2), MultiheadFeatureSelfAttention(8, 2, 4)):
        module = randomise(module, seed=7)
        torch.testing.assert_close(module(y[:, order]), module(y)[:, order], rtol=0, atol=1e-12)


def test_heads_that_do_not_divide_the_dimensions_are_refused():
    with pytest.raises(ValueError, match=r"num_heads=3 must divide embed_dim=8"):
        MultiheadSelfAttention(8, 3)
    with pytest.raises(ValueError, match=r"num_heads=4 must divide feature_dim=6"):
        MultiheadFeatureSelfAttention(8, 4, 6)
