# SPDX-License-Identifier: Apache-2.0
"""A transformer that inpaints all patches of an image in one pass, none seeing the hole around itself: pure torch.

In the paper's terms: the tokens of all patches (eq. 3) are the content, the inpaint embedding at all positions (eq. 4)
are the queries. Queries attend to the content outside the hole around their own patch. The content never mixes, so what
lies in a hole cannot reach its query, however deep the model is.
"""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from timm.layers import Mlp, trunc_normal_
from torch import nn
from torch.nn.functional import pad

from anomalib_intra.components.arguments import check_counts
from anomalib_intra.data.image_range import as_colour, check_range
from anomalib_intra.one_pass.attention import BlockGrid, CrossAttention, ring_bias
from anomalib_intra.one_pass.comparison import ComparisonHead


class Painting(NamedTuple):
    """What the model gives for a batch of images, once for each of R radii.

    Args:
        image (torch.Tensor): The images it saw, in [0, 1], shape ``(B, 3, H, W)``.
        painted (torch.Tensor): The images it expected, shape ``(B, R, 3, H, W)``.
        of_cells (torch.Tensor): For each cell, how little it looks like what was expected there, as a logit; shape
            ``(B, R, N, M)``, or more where patches have several cells.
        of_pixels (torch.Tensor): The same for each pixel, shape ``(B, R, H, W)``.
    """

    image: torch.Tensor
    painted: torch.Tensor
    of_cells: torch.Tensor
    of_pixels: torch.Tensor


class ContentBlock(nn.Module):
    """Pre-norm MLP D -> 4D -> D with a residual connection, each token alone.

    Args:
        embed_dim (int): Latent dimension D.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim)
        self.mlp = Mlp(embed_dim, 4 * embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens ``(..., D)`` to tokens ``(..., D)``."""
        return x + self.mlp(self.norm(x))


class QueryBlock(nn.Module):
    """Pre-norm transformer block of the queries: cross-attention to the content, then an MLP D -> 4D -> D.

    Args:
        embed_dim (int): Latent dimension D.
        num_heads (int): Number h of attention heads; divides D.
    """

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim)
        self.attention = CrossAttention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.mlp = Mlp(embed_dim, 4 * embed_dim)

    def forward(self, y: torch.Tensor, *seen: torch.Tensor) -> torch.Tensor:
        """Map queries ``(B, blocks, T, D)`` to the next ones; what they see is as in :class:`CrossAttention`."""
        y = y + self.attention(self.norm1(y), *seen)
        return y + self.mlp(self.norm2(y))


class OnePassTransformer(nn.Module):
    """Inpaints all patches of an image in one pass, each from what lies outside the hole around it.

    The hole around a patch is all patches within a Chebyshev distance, its radius: 0 hides the patch alone, 1 also the
    eight around it, -1 hides nothing. One set of weights knows several radii.

    Near patches are seen one by one, far ones as the mean of their block. A head compares what is there with what
    was expected in its place, in small cells and pixel by pixel. Needs neither Lightning nor anomalib.

    Args:
        image_size (tuple[int, int]): Height and width of the images in pixels; their positions tie the model to it.
        patch_size (int): Side length K of a patch in pixels.
        embed_dim (int): Latent dimension D.
        depth (int): Number n of the queries' transformer blocks.
        num_heads (int): Number h of attention heads; divides D.
        block_size (int): Side length in patches of the blocks that near and far are told apart by.
        radii (Sequence[int]): Radii of the holes the model knows, each in -1 .. ``block_size``.
        shortest_side (int): Fewest pixels of a side, where the loss that it is trained by needs some.

    Raises:
        ValueError: If the sizes do not fit together.

    Example:
        >>> model = OnePassTransformer((64, 96), embed_dim=32, depth=2, num_heads=4)
        >>> model.reconstruct(torch.rand(2, 3, 64, 96), radius=1).shape
        torch.Size([2, 3, 64, 96])
    """

    channel_mean: torch.Tensor
    channel_std: torch.Tensor

    def __init__(
        self,
        image_size: tuple[int, int] = (256, 256),
        patch_size: int = 8,
        embed_dim: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        block_size: int = 4,
        radii: Sequence[int] = (0, 1, 2),
        shortest_side: int = 1,
    ) -> None:
        super().__init__()
        sizes = {"patch_size": patch_size, "embed_dim": embed_dim, "num_heads": num_heads, "block_size": block_size}
        check_counts(**sizes, depth=depth)
        if embed_dim % num_heads:
            msg = f"num_heads={num_heads} must divide embed_dim={embed_dim}."
            raise ValueError(msg)
        are_different = isinstance(radii, Sequence) and 0 < len(radii) == len(set(radii))
        if not are_different or not all(isinstance(one, Integral) and -1 <= one <= block_size for one in radii):
            msg = (
                f"radii must be different numbers in -1 .. {block_size}, the block_size, such as (0, 1, 2), got "
                f"{radii!r}: a far block is seen as a whole, so no hole may reach into one."
            )
            raise ValueError(msg)
        _check_image_size(*image_size, patch_size, max(radii), shortest_side)

        self.image_size = (image_size[0], image_size[1])
        self.patch_size = patch_size
        self.num_heads = num_heads
        self.block_size = block_size
        self.radii = tuple(int(radius) for radius in radii)
        self.grid = BlockGrid(image_size[0] // patch_size, image_size[1] // patch_size, block_size)

        self.register_buffer("channel_mean", torch.full((3,), 0.5))
        self.register_buffer("channel_std", torch.full((3,), 0.25))
        patch_dim = 3 * patch_size**2
        self.patch_embedding = nn.Linear(patch_dim, embed_dim, bias=False)
        self.position_embedding = nn.Parameter(torch.zeros(*self.grid.inside.shape, embed_dim))
        self.inpaint_embedding = nn.Parameter(torch.zeros(embed_dim))
        self.radius_embedding = nn.Parameter(torch.zeros(len(radii), embed_dim))
        self.content_blocks = nn.Sequential(ContentBlock(embed_dim))
        self.content_norm = nn.LayerNorm(embed_dim)
        # Keys and values of all blocks are projected at once.
        self.near_key_value = nn.Linear(embed_dim, 2 * depth * embed_dim)
        self.far_key_value = nn.Linear(embed_dim, 2 * depth * embed_dim)
        self.near_bias = nn.Parameter(torch.zeros(self.grid.near_offsets, depth * num_heads))
        self.far_bias = nn.Parameter(torch.zeros(self.grid.far_offsets, depth * num_heads))
        self.blocks = nn.ModuleList(QueryBlock(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)
        self.to_pixels = nn.Linear(embed_dim, patch_dim)
        self.comparison = ComparisonHead(embed_dim, patch_size)

        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all weights anew: truncated normal with a standard deviation of 0.02, biases zero.

        The biases of positions begin at the ring around the hole: begun at zero, they take long to find it.
        """
        trunc_normal_(self.position_embedding, std=0.02)
        trunc_normal_(self.inpaint_embedding, std=0.02)
        nn.init.zeros_(self.radius_embedding)
        self.apply(_initialise)
        with torch.no_grad():
            near = ring_bias(self.block_size, self.num_heads, max(self.radii))
            self.near_bias.copy_(repeat(near, "o h -> o (n h)", n=len(self.blocks)))
        nn.init.constant_(self.far_bias, -1)

    def matrices_between_tokens(self) -> list[nn.Parameter]:
        """The weight matrices from tokens to tokens; those that read or paint pixels, and the head's, are none.

        Returns:
            list[nn.Parameter]: Weights of two dimensions.
        """
        layers = [self.content_blocks, self.near_key_value, self.far_key_value, self.blocks]
        return [weight for layer in layers for weight in layer.parameters() if weight.ndim == 2]

    def set_channel_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Keep the training set's mean and standard deviation, by which images are normalised and painted.

        Args:
            mean (torch.Tensor): Mean of each channel, shape ``(3,)``.
            std (torch.Tensor): Standard deviation of each channel, shape ``(3,)``; at least 0.01 is kept.
        """
        self.channel_mean.copy_(mean)
        self.channel_std.copy_(std.clamp(min=0.01))

    def forward(self, images: torch.Tensor) -> Painting:
        """Paint images with each of the model's radii; the content is computed once.

        Args:
            images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``; ``(B, 1, H, W)`` is taken as grey.

        Returns:
            Painting: Images, what was expected, in the order of the radii, and how suspicious patches and pixels are.

        Raises:
            ValueError: If the images are not a batch of one or three channels, of another size than the model's, or
                hold values that are not finite or not in [0, 1].
        """
        return self.paint(images, self.radii)

    def reconstruct(self, images: torch.Tensor, radius: int) -> torch.Tensor:
        """Inpaint every patch of every image from what lies outside the hole around it.

        Args:
            images (torch.Tensor): Images as in :meth:`forward`.
            radius (int): Radius of the holes, one of the model's.

        Returns:
            torch.Tensor: Reconstructions of shape ``(B, 3, H, W)``, about in [0, 1], not clipped.

        Raises:
            ValueError: As in :meth:`forward`, or if the model does not know the radius.
        """
        return self.paint(images, (radius,)).painted[:, 0]

    def paint(self, images: torch.Tensor, radii: tuple[int, ...]) -> Painting:
        """Paint images with some of the model's radii.

        Args:
            images (torch.Tensor): Images as in :meth:`forward`.
            radii (tuple[int, ...]): Radii of the holes, R of the model's.

        Returns:
            Painting: As :meth:`forward`, for these radii.

        Raises:
            ValueError: As in :meth:`forward`, or if the model does not know a radius.
        """
        if not set(radii) <= set(self.radii):
            msg = f"This model knows holes of the radii {self.radii}, got {radii}: build it with these among radii."
            raise ValueError(msg)
        images = as_colour(images)
        self._check(images)
        mean, std = (rearrange(x, "c -> c 1 1") for x in (self.channel_mean, self.channel_std))
        normalised = (images - mean) / std
        content = self._embed(normalised)
        expected = self._expect(content, radii)
        sides = {"k1": self.patch_size, "k2": self.patch_size}
        painted = rearrange(self.to_pixels(expected), "b n m (k1 k2 c) -> b c (n k1) (m k2)", **sides)

        seen, originals = (
            repeat(x, "b ... -> (b r) ...", r=len(radii)) for x in (self._to_grid(content, 1), normalised)
        )
        logits = self.comparison(expected, seen, originals, painted)
        painted, *logits = (rearrange(x, "(b r) ... -> b r ...", r=len(radii)) for x in (painted, *logits))
        return Painting(images, painted * std + mean, *logits)

    def _embed(self, normalised: torch.Tensor) -> torch.Tensor:
        """Cut images into patches, block by block, embed them with their positions (eq. 3), each alone."""
        (rows, columns), K, S = self.grid.blocks, self.patch_size, self.block_size  # noqa: N806
        height, width = self.image_size
        padded = pad(normalised, (0, columns * S * K - width, 0, rows * S * K - height))
        patches = rearrange(padded, "b c (i p k1) (j q k2) -> b (i j) (p q) (k1 k2 c)", k1=K, k2=K, p=S, q=S)
        content = self.patch_embedding(patches) + self.position_embedding
        return self.content_norm(self.content_blocks(content))

    def _expect(self, content: torch.Tensor, radii: tuple[int, ...]) -> torch.Tensor:
        """Tokens of what is expected at each patch, from the content outside the hole, ``(B * R, N, M, D)``."""
        near, far = self._project(content)
        biases = self.grid.spread(self.near_bias, self.far_bias, len(radii))
        near_bias, far_bias = (x.unflatten(0, (len(self.blocks), -1)) for x in biases)
        mask = self.grid.mask(radii, self.near_bias.dtype)
        y = self._queries(radii).expand(content.shape[0], -1, -1, -1)
        for block, *seen in zip(self.blocks, near, far, near_bias, far_bias, strict=True):
            y = block(y, *seen, mask)
        return self._to_grid(self.norm(y), len(radii))

    def _project(self, content: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all depths: of the patches and of the pooled blocks."""
        split = {"l": len(self.blocks), "kv": 2, "h": self.num_heads}
        near = self.near_key_value(content)
        near = rearrange(near, "b (i j) t (l kv h d) -> l b h kv i j t d", i=self.grid.blocks[0], **split)
        far = rearrange(self.far_key_value(self.grid.pool(content)), "b m (l kv h d) -> l b h kv m d", **split)
        return near, far

    def _queries(self, radii: tuple[int, ...]) -> torch.Tensor:
        """The inpaint embedding at all positions (eq. 4), once for each radius, shape ``(blocks, R * S * S, D)``."""
        radius = self.radius_embedding[[self.radii.index(r) for r in radii]]
        position = rearrange(self.position_embedding, "n t d -> n 1 t d")
        return rearrange(self.inpaint_embedding + position + radius[:, None], "n r t d -> n (r t) d")

    def _to_grid(self, tokens: torch.Tensor, radii: int) -> torch.Tensor:
        """Put the blocks' tokens together, without those that lie outside the image: ``(B * R, N, M, D)``."""
        S = self.block_size  # noqa: N806
        pattern = "b (i j) (r p q) d -> (b r) (i p) (j q) d"
        grid = rearrange(tokens, pattern, i=self.grid.blocks[0], r=radii, p=S, q=S)
        rows, columns = (side // self.patch_size for side in self.image_size)
        return grid[:, :rows, :columns]

    def _check(self, images: torch.Tensor) -> None:
        height, width = images.shape[-2:]
        if (height, width) != self.image_size:
            msg = (
                f"Images of {height} x {width} pixels reached a model whose positions are for {self.image_size[0]} x "
                f"{self.image_size[1]}: resize the images, or build the model with image_size=({height}, {width})."
            )
            raise ValueError(msg)
        if not torch.compiler.is_compiling():
            check_range(images)


def _check_image_size(height: int, width: int, patch_size: int, largest_radius: int, shortest_side: int) -> None:
    """Refuse sizes that are no grid of patches, or too small, or of which a hole can hide everything."""
    shortest = patch_size * math.ceil(shortest_side / patch_size)
    longest = patch_size * (2 * largest_radius + 2)
    fit = all(side >= shortest and side % patch_size == 0 for side in (height, width))
    if fit and max(height, width) >= longest:
        return
    near = [max(shortest, round(side / patch_size) * patch_size) for side in (height, width)]
    if max(near) < longest:
        near[near.index(max(near))] = longest
    msg = (
        f"Images of {height} x {width} pixels do not work with patches of {patch_size} x {patch_size} pixels and holes "
        f"of radius {largest_radius}: height and width must be multiples of {patch_size}, both at least {shortest} and "
        f"one of them at least {longest}; the nearest size that works is {near[0]} x {near[1]}."
    )
    raise ValueError(msg)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.LayerNorm | nn.Conv2d):
        module.reset_parameters()
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
