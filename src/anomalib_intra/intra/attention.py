# SPDX-License-Identifier: Apache-2.0
"""Multihead self-attention (eq. 6-9) and multihead feature self-attention (eq. 10)."""

import torch
from einops import rearrange
from timm.layers import Mlp
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention


class MultiheadSelfAttention(nn.Module):
    """Multihead self-attention, MSA (eq. 6-9).

    Args:
        embed_dim (int): Latent dimension D.
        num_heads (int): Number h of heads; divides D.

    Example:
        >>> MultiheadSelfAttention(embed_dim=64, num_heads=8)(torch.rand(2, 49, 64)).shape
        torch.Size([2, 49, 64])
    """

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        if embed_dim % num_heads:
            msg = f"num_heads={num_heads} must divide embed_dim={embed_dim}."
            raise ValueError(msg)
        self.num_heads = num_heads
        self.query: nn.Module = nn.Linear(embed_dim, embed_dim)
        self.key: nn.Module = nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)
        self.unify = nn.Linear(embed_dim, embed_dim)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            y (torch.Tensor): Sequence of shape ``(B, L * L, D)``.

        Returns:
            torch.Tensor: Sequence of shape ``(B, L * L, D)``.
        """
        return self.attend(self.query(y), self.key(y), self.value(y))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend with queries, keys and values of all heads side by side (eq. 7-9).

        Args:
            q (torch.Tensor): Queries of shape ``(B, P, F)``; P = L * L in self-attention.
            k (torch.Tensor): Keys of shape ``(B, L * L, F)``.
            v (torch.Tensor): Values of shape ``(B, L * L, D)``.

        Returns:
            torch.Tensor: Sequence of shape ``(B, P, D)``.
        """
        q, k, v = (rearrange(x, "b l (h d) -> b h l d", h=self.num_heads) for x in (q, k, v))
        return self.unify(rearrange(_attend(q, k, v), "b h l d -> b l (h d)"))


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Compute softmax(q k^T / sqrt(dimension of q)) v for each head: eq. 7 and 8, with D'' in place of D' for MFSA."""
    scale = q.shape[-1] ** -0.5
    if v.device.type == "cpu" and v.dtype == torch.bfloat16:
        # Forwards and backwards, torch's own kernel takes four to seven times as long here (docs/lab/speed.md). As it
        # does, this keeps q k^T in float32: rounded, it would lose what a sharp softmax needs.
        with torch.autocast("cpu", enabled=False):
            weights = torch.softmax(scale * q.float() @ k.float().mT, dim=-1)
            return weights.to(v.dtype) @ v
    # The fast kernels want one dimension for all three; zeros change no dot product.
    missing = v.shape[-1] - q.shape[-1]
    if missing > 0:
        q, k = pad(q, (0, missing)), pad(k, (0, missing))
    return scaled_dot_product_attention(q, k, v, scale=scale)


class MultiheadFeatureSelfAttention(MultiheadSelfAttention):
    """Multihead feature self-attention, MFSA (eq. 10).

    Queries and keys go through MLPs with one hidden GELU layer, D -> 2D -> F: where patches look alike, their dot
    products would otherwise be too close to each other to tell them apart.

    Args:
        embed_dim (int): Latent dimension D.
        num_heads (int): Number h of heads; divides D and F.
        feature_dim (int): Dimension F of queries and keys.

    Example:
        >>> attention = MultiheadFeatureSelfAttention(embed_dim=64, num_heads=8, feature_dim=32)
        >>> attention(torch.rand(2, 49, 64)).shape
        torch.Size([2, 49, 64])
    """

    def __init__(self, embed_dim: int, num_heads: int, feature_dim: int) -> None:
        super().__init__(embed_dim, num_heads)
        if feature_dim % num_heads:
            msg = f"num_heads={num_heads} must divide feature_dim={feature_dim}."
            raise ValueError(msg)
        self.query = Mlp(embed_dim, 2 * embed_dim, feature_dim)
        self.key = Mlp(embed_dim, 2 * embed_dim, feature_dim)
