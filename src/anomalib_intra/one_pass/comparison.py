# SPDX-License-Identifier: Apache-2.0
"""A learned comparison of what is there with what was expected."""

import torch
from einops import rearrange, repeat
from timm.layers import Mlp
from torch import nn
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits

_HIDDEN, _FEATURES, _TEXTURE = 256, 64, 32
#: Largest side of a cell in pixels: a small defect counts for little in a large one.
_LARGEST_CELL = 8
#: A value changed visibly if by more than this.
_CHANGED = 0.04
#: A cell is spoiled if more than this share of it changed visibly, and a replaced pixel if more than this share of the
#: square around it did, whose side this is.
_SHARE, _SQUARE = 0.1, 9


class ComparisonHead(nn.Module):
    """Tells for each cell and pixel whether it is as expected; trained to find the spoiled parts of training images.

    A difference in brightness that normal parts show, too, counts for less than one that they never show: eq. 16 cannot
    tell the two apart, this learns it. Cells tell best whether there is a defect, pixels where it ends. A cell is a
    patch, whose sides are halved while they are even and longer than 8 pixels. The gradients do not reach the
    transformer, which would paint worse.

    Args:
        embed_dim (int): Latent dimension D.
        patch_size (int): Side length K of a patch in pixels.

    Example:
        >>> tokens, images = torch.rand(2, 4, 6, 32), torch.rand(2, 3, 64, 96)
        >>> of_cells, of_pixels = ComparisonHead(32, 16)(tokens, tokens, images, images)
        >>> of_cells.shape, of_pixels.shape
        (torch.Size([2, 8, 12]), torch.Size([2, 64, 96]))
    """

    def __init__(self, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.cell = patch_size
        while self.cell > _LARGEST_CELL and self.cell % 2 == 0:
            self.cell //= 2
        self.cells = patch_size // self.cell  # along a side of a patch
        self.texture = _texture_of_cells(3 * 3, embed_dim, self.cell)
        self.mlp = Mlp(3 * embed_dim, _HIDDEN, _FEATURES)
        self.neighbours = nn.Sequential(
            nn.GELU(),
            nn.Conv2d(_FEATURES, _FEATURES, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(_FEATURES, 1 + self.cell**2, 3, padding=1),
        )

    def forward(
        self, expected: torch.Tensor, seen: torch.Tensor, images: torch.Tensor, painted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compare the patches of images with what was expected.

        Args:
            expected (torch.Tensor): Tokens of what was expected, shape ``(B, N, M, D)``.
            seen (torch.Tensor): Tokens of what is there, shape ``(B, N, M, D)``.
            images (torch.Tensor): The images, shape ``(B, 3, N * K, M * K)``.
            painted (torch.Tensor): What was painted in the place of all their patches, of the same shape.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: Logits of the cells, shape ``(B, N, M)`` where each patch is one, and of
            the pixels, shape ``(B, N * K, M * K)``.
        """
        expected, seen, painted = expected.detach(), seen.detach(), painted.detach()
        expected, seen = (repeat(x, "b n m d -> b (n p) (m q) d", p=self.cells, q=self.cells) for x in (expected, seen))
        texture = self.texture(torch.cat([images, painted, images - painted], dim=1))
        features = self.mlp(torch.cat([expected, seen, rearrange(texture, "b d n m -> b n m d")], dim=-1))
        logits = self.neighbours(rearrange(features, "b n m d -> b d n m"))
        pixels = rearrange(logits[:, 1:], "b (k1 k2) n m -> b (n k1) (m k2)", k1=self.cell)
        return logits[:, 0], pixels


def _texture_of_cells(channels: int, embed_dim: int, cell: int) -> nn.Sequential:
    """Convolutions that make a vector of each cell; each halves the sides, as often as they can be halved.

    A texture has no place within a cell: weights for each of its pixels would have to learn it at each.
    """
    layers: list[nn.Module] = []
    width, rest = min(_TEXTURE, embed_dim), cell
    while rest % 2 == 0:
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GELU()]
        channels, width, rest = width, min(2 * width, embed_dim), rest // 2
    return nn.Sequential(*layers, nn.Conv2d(channels, embed_dim, rest, stride=rest))


def comparison_loss(
    of_cells: torch.Tensor,
    of_pixels: torch.Tensor,
    images: torch.Tensor,
    spoiled: torch.Tensor,
    replaced: torch.Tensor,
) -> torch.Tensor:
    """Cross-entropy of which cells were spoiled, plus that of which pixels.

    Spoiled is what was replaced, where that can be seen: also a pixel that happens to look as before, if those around
    it do not, for defects have no holes. Of a cell that changed a little, and of a pixel at the rim, either answer is
    right.

    Args:
        of_cells (torch.Tensor): Logits of the cells, shape ``(B, N, M)``.
        of_pixels (torch.Tensor): Logits of the pixels, shape ``(B, H, W)``.
        images (torch.Tensor): Clean images in [0, 1], shape ``(B, 3, H, W)``.
        spoiled (torch.Tensor): The same images spoiled.
        replaced (torch.Tensor): How much each pixel belongs to what was replaced, in [0, 1], shape ``(B, 1, H, W)``.

    Returns:
        torch.Tensor: The loss, a scalar.

    Example:
        >>> images, replaced = torch.zeros(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)
        >>> replaced[..., 4:12, 4:12] = 1
        >>> of_pixels = 40 * replaced[:, 0] - 20
        >>> of_cells = torch.full((1, 2, 2), 20.0)
        >>> float(comparison_loss(of_cells, of_pixels, images, images + replaced, replaced)) < 1e-6
        True
    """
    changed = replaced * ((spoiled - images).abs().amax(dim=1, keepdim=True) > _CHANGED)
    share = avg_pool2d(changed, images.shape[-1] // of_cells.shape[-1])
    cells = _cross_entropy(of_cells, share > _SHARE, share == 0)

    around = avg_pool2d((changed > 0).float(), _SQUARE, stride=1, padding=_SQUARE // 2)
    is_spoiled, is_clean = (replaced > 0.5) & (around > _SHARE), (replaced == 0) | (around == 0)
    return cells + _cross_entropy(of_pixels, is_spoiled, is_clean)


def _cross_entropy(logits: torch.Tensor, is_spoiled: torch.Tensor, is_clean: torch.Tensor) -> torch.Tensor:
    loss = binary_cross_entropy_with_logits(logits.float(), is_spoiled[:, 0].float(), reduction="none")
    return (loss * (is_spoiled | is_clean)[:, 0]).mean()
