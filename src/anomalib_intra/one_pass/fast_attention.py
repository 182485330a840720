# SPDX-License-Identifier: Apache-2.0
"""The attention of :mod:`anomalib_intra.one_pass.attention` for a CPU: piece by piece, with its own gradient.

Plainly written, most of its time goes into moving scores, and nine copies of every key and value, to the memory and
back. Here, pieces of the image are gathered, compared, weighted and summed up one after the other, and of it all only
the weights are kept for the gradient.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import pad

#: Scores of a piece, at most, if it has more than one row of blocks: these and what they are made of fit in a cache.
_SCORES = 2**19


class FastAttention(torch.autograd.Function):
    """As :func:`anomalib_intra.one_pass.attention.attend`, with images and heads as one dimension G of ``B * h``."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: torch.Tensor,
        near: torch.Tensor,
        far: torch.Tensor,
        near_bias: torch.Tensor,
        far_bias: torch.Tensor,
        mask: torch.Tensor,
        with_gradient: bool,
    ) -> torch.Tensor:
        """Attend.

        Args:
            ctx (FunctionCtx): Where is kept what the gradient needs.
            q (torch.Tensor): Queries of shape ``(G, I * J, T, d)``, for I x J blocks.
            near (torch.Tensor): Keys and values of the patches, shape ``(G, 2, I, J, S * S, d)``.
            far (torch.Tensor): Keys and values of the blocks, shape ``(G, 2, I * J, d)``.
            near_bias (torch.Tensor): Bias of the patches, shape ``(h, T, 9 * S * S)``.
            far_bias (torch.Tensor): Bias of the blocks, shape ``(h, I * J, I * J)``.
            mask (torch.Tensor): 0, or minus infinity for what is hidden, shape ``(I * J, T, 9 * S * S + I * J)``.
            with_gradient (bool): Whether a gradient may be asked for.

        Returns:
            torch.Tensor: Tokens of shape ``(G, I * J, T, d)``.
        """
        heads, _, patches = near_bias.shape
        near = pad(near, (0, 0, 0, 0, 1, 1, 1, 1))  # around the image, there is one more block for all to be alike
        result = torch.empty_like(q)
        near_bias = pad(near_bias, (0, mask.shape[-1] - patches))  # whole rows are added faster than parts of them
        kept = q.new_empty(*q.shape[:3], mask.shape[-1]) if with_gradient else None
        for g, rows, blocks in _pieces(q, near, mask):
            k, v = _gather(near[g], far[g], rows)
            scores = torch.bmm(q[g, blocks], k.mT).to(mask.dtype).add_(mask[blocks]).add_(near_bias[g % heads])
            scores[..., patches:].add_(far_bias[g % heads, blocks, None])
            weights = torch.softmax(scores, dim=-1)
            weights = weights.to(q.dtype) if kept is None else kept[g, blocks].copy_(weights)
            torch.bmm(weights, v, out=result[g, blocks])
        if kept is not None:
            ctx.save_for_backward(q, near, far, kept)
            ctx.tables = (heads, near_bias.shape[1], patches), far_bias.shape, mask.dtype  # type: ignore[attr-defined]
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of all inputs but the mask, from that of the result."""
        q, near, far, kept = ctx.saved_tensors
        near_shape, far_shape, wide = ctx.tables
        heads, _, patches = near_shape
        gradient = gradient.contiguous()
        d_q, d_near, d_far = torch.empty_like(q), torch.zeros_like(near), torch.zeros_like(far)
        d_near_bias, d_far_bias = q.new_zeros(near_shape, dtype=wide), q.new_zeros(far_shape, dtype=wide)
        for g, rows, blocks in _pieces(q, near, kept[0]):
            k, v = _gather(near[g], far[g], rows)
            weights, d_result = kept[g, blocks], gradient[g, blocks]
            d_kv = k.new_empty(2, *k.shape)
            torch.bmm(weights.mT, d_result, out=d_kv[1])
            d_scores = torch._softmax_backward_data(torch.bmm(d_result, v.mT), weights, -1, weights.dtype)
            torch.bmm(d_scores, k, out=d_q[g, blocks])
            torch.bmm(d_scores.mT, q[g, blocks], out=d_kv[0])
            d_near_bias[g % heads] += d_scores[..., :patches].sum(dim=0, dtype=wide)
            d_far_bias[g % heads, blocks] += d_scores[..., patches:].sum(dim=1, dtype=wide)
            _scatter(d_kv, d_near[g], d_far[g], rows)
        return d_q, d_near[:, :, 1:-1, 1:-1], d_far, d_near_bias, d_far_bias, None, None


def _pieces(q: torch.Tensor, near: torch.Tensor, scores: torch.Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Images and heads, one by one, in some rows of blocks at once: number, rows, and the same as blocks."""
    i, j = (length - 2 for length in near.shape[2:4])
    at_once = max(1, _SCORES // (scores[0].numel() * j))
    for g in range(len(q)):
        for first in range(0, i, at_once):
            last = min(first + at_once, i)
            yield g, slice(first, last), slice(first * j, last * j)


def _gather(near: torch.Tensor, far: torch.Tensor, rows: slice) -> torch.Tensor:
    """What the blocks of some rows see: the patches of nine blocks, then all blocks, ``(2, blocks, U, d)``."""
    around = near[:, rows.start : rows.stop + 2].unfold(1, 3, 1).unfold(2, 3, 1)  # 2 i j t d 3 3
    around = around.permute(0, 1, 2, 5, 6, 3, 4)
    shape = around.shape
    patches = shape[3] * shape[4] * shape[5]
    kv = near.new_empty(*shape[:3], patches + far.shape[1], shape[-1])
    kv[..., :patches, :].view(shape).copy_(around)
    kv[..., patches:, :] = far[:, None, None]
    return kv.flatten(1, 2)


def _scatter(d_kv: torch.Tensor, d_near: torch.Tensor, d_far: torch.Tensor, rows: slice) -> None:
    """Add the gradients of what was gathered to those of where it came from."""
    i, j = rows.stop - rows.start, d_near.shape[2] - 2
    patches = 9 * d_near.shape[3]
    around = d_kv[..., :patches, :].unflatten(2, (9, -1)).unflatten(1, (i, j))  # 2 i j 9 t d
    for number in range(9):
        down, right = divmod(number, 3)
        d_near[:, rows.start + down : rows.stop + down, right : right + j].add_(around[:, :, :, number])
    d_far.add_(d_kv[..., patches:, :].sum(dim=1))
