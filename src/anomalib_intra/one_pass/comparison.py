# SPDX-License-Identifier: Apache-2.0
"""A learned comparison of what is there with what was expected."""

import torch
from einops import rearrange
from timm.layers import Mlp
from torch import nn

_HIDDEN, _FEATURES = 256, 64


class ComparisonHead(nn.Module):
    """Tells for each patch whether it is as expected; trained to find the parts of training images that were spoiled.

    A difference in brightness that normal parts show, too, counts for less than one that they never show: eq. 16 cannot
    tell the two apart, this learns it. Its gradients do not reach the transformer, which would paint worse.

    Args:
        embed_dim (int): Latent dimension D.
        patch_dim (int): Values K * K * C of a patch.

    Example:
        >>> tokens, patches = torch.rand(2, 4, 6, 32), torch.rand(2, 4, 6, 192)
        >>> ComparisonHead(32, 192)(tokens, tokens, patches, patches).shape
        torch.Size([2, 4, 6])
    """

    def __init__(self, embed_dim: int, patch_dim: int) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(3 * patch_dim, embed_dim)
        self.mlp = Mlp(3 * embed_dim, _HIDDEN, _FEATURES)
        self.neighbours = nn.Sequential(
            nn.GELU(),
            nn.Conv2d(_FEATURES, _FEATURES, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(_FEATURES, 1, 3, padding=1),
        )

    def forward(
        self, expected: torch.Tensor, seen: torch.Tensor, patches: torch.Tensor, painted: torch.Tensor
    ) -> torch.Tensor:
        """Compare the patches of a grid with what was expected.

        Args:
            expected (torch.Tensor): Tokens of what was expected, shape ``(B, N, M, D)``.
            seen (torch.Tensor): Tokens of what is there, shape ``(B, N, M, D)``.
            patches (torch.Tensor): The patches, flattened, shape ``(B, N, M, K * K * C)``.
            painted (torch.Tensor): The patches that were painted in their place, of the same shape.

        Returns:
            torch.Tensor: Logits, shape ``(B, N, M)``.
        """
        expected, seen, painted = expected.detach(), seen.detach(), painted.detach()
        differences = self.patch_embedding(torch.cat([patches, painted, patches - painted], dim=-1))
        features = self.mlp(torch.cat([expected, seen, differences], dim=-1))
        logits = self.neighbours(rearrange(features, "b n m d -> b d n m"))
        return rearrange(logits, "b 1 n m -> b n m")
