# SPDX-License-Identifier: Apache-2.0
"""Attention of all patches of an image to what lies outside the hole around each: near patches alone, far ones pooled.

The patches are taken in square blocks. A query sees the patches of its own block and of the eight around it one by one,
and each other block as one token, the mean of its patches. So the cost is near-linear in the number of patches.
"""

import torch
from einops import rearrange, repeat
from torch import nn
from torch.nn.functional import embedding, pad

#: Steps from a patch to the eight around it; in the first heads of a block, the bias begins at one of them.
_RING = [(-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1)]


class BlockGrid(nn.Module):
    """Which patches and which blocks a query may see, and where they lie from it.

    The last blocks of a row or column may reach over the edge of the image; nothing sees what lies there.

    Args:
        rows (int): Number N of patch rows.
        columns (int): Number M of patch columns.
        block_size (int): Side length S of a block in patches.

    Example:
        >>> BlockGrid(rows=6, columns=8, block_size=4).blocks
        (2, 2)
    """

    inside: torch.Tensor
    near_distance: torch.Tensor
    near_offset: torch.Tensor
    near_visible: torch.Tensor
    far_offset: torch.Tensor
    far_visible: torch.Tensor

    def __init__(self, rows: int, columns: int, block_size: int) -> None:
        super().__init__()
        size = block_size
        self.block_size = size
        self.blocks = (-(-rows // size), -(-columns // size))
        #: Numbers of offsets from a query to what it sees, for patches and for blocks.
        self.near_offsets, self.far_offsets = (4 * size - 1) ** 2, (2 * self.blocks[0] - 1) * (2 * self.blocks[1] - 1)

        def register(name: str, value: torch.Tensor) -> None:
            self.register_buffer(name, value, persistent=False)

        # Rows and columns of patches, counted from the upper left one of a block: the block's own, and the near ones in
        # the order of neighbourhoods().
        own = torch.cartesian_prod(torch.arange(size), torch.arange(size))
        around = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2)) * size
        near = rearrange(around[:, None] + own, "around t yx -> (around t) yx")
        block = torch.cartesian_prod(*(torch.arange(number) for number in self.blocks))
        limit = torch.tensor((rows, columns))

        def in_image(at: torch.Tensor) -> torch.Tensor:
            return ((at >= 0) & (at < limit)).all(dim=-1)

        register("inside", in_image(block[:, None] * size + own))
        offset = own[:, None] - near
        register("near_distance", offset.abs().amax(dim=-1))
        register("near_offset", _number(offset + 2 * size - 1, 4 * size - 1))
        register("near_visible", in_image(block[:, None] * size + near))
        offset = block[:, None] - block
        register("far_offset", _number(offset + torch.tensor(self.blocks) - 1, 2 * self.blocks[1] - 1))
        register("far_visible", offset.abs().amax(dim=-1) > 1)

    def neighbourhoods(self, tokens: torch.Tensor) -> torch.Tensor:
        """Gather the patches of each block and of the eight around it.

        Args:
            tokens (torch.Tensor): Tokens in blocks, shape ``(..., blocks, S * S, D)``.

        Returns:
            torch.Tensor: Tokens of shape ``(..., blocks, 9 * S * S, D)``, zero outside of the blocks.
        """
        i, j = self.blocks
        grid = pad(tokens.unflatten(-3, (i, j)), (0, 0, 0, 0, 1, 1, 1, 1))
        around = [grid[..., di : di + i, dj : dj + j, :, :] for di in range(3) for dj in range(3)]
        return torch.cat(around, dim=-2).flatten(-4, -3)

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """Take the mean of each block's patches.

        Args:
            tokens (torch.Tensor): Tokens in blocks, shape ``(B, blocks, S * S, D)``.

        Returns:
            torch.Tensor: Tokens of shape ``(B, blocks, D)``.
        """
        inside = rearrange(self.inside, "n t -> n t 1")
        return (tokens * inside).sum(dim=2) / inside.sum(dim=1)

    def bias(self, near: torch.Tensor, far: torch.Tensor, radii: tuple[int, ...]) -> torch.Tensor:
        """Spread relative position biases over all queries and what they see; minus infinity is what they do not.

        Args:
            near (torch.Tensor): Bias for each offset of a patch, shape ``(near_offsets, depth * heads)``.
            far (torch.Tensor): Bias for each offset of a block, shape ``(far_offsets, depth * heads)``.
            radii (tuple[int, ...]): Radii of the holes, R of them.

        Returns:
            torch.Tensor: Biases of shape ``(depth * heads, blocks, R * S * S, 9 * S * S + blocks)``.
        """
        hidden = -torch.inf
        holes = torch.tensor(radii, device=self.near_distance.device)
        outside = rearrange(self.near_distance, "t u -> 1 t u") > rearrange(holes, "r -> r 1 1")
        visible = rearrange(self.near_visible, "n u -> n 1 u") & rearrange(outside, "r t u -> 1 (r t) u")
        near = repeat(embedding(self.near_offset, near), "t u h -> h 1 (r t) u", r=len(radii))
        far = rearrange(embedding(self.far_offset, far), "n m h -> h n 1 m")
        far = far.masked_fill(~rearrange(self.far_visible, "n m -> n 1 m"), hidden)
        return torch.cat([near.masked_fill(~visible, hidden), far.expand(-1, -1, near.shape[2], -1)], dim=-1)


class CrossAttention(nn.Module):
    """Multihead cross-attention from queries in blocks to keys and values that were projected before.

    Args:
        embed_dim (int): Latent dimension D.
        num_heads (int): Number h of heads; divides D.
    """

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(embed_dim, embed_dim)
        self.unify = nn.Linear(embed_dim, embed_dim)

    def forward(self, y: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            y (torch.Tensor): Queries of shape ``(B, blocks, T, D)``.
            k (torch.Tensor): Keys of shape ``(B, h, blocks, U, D / h)``.
            v (torch.Tensor): Values of the same shape.
            bias (torch.Tensor): What is added to the scores, shape ``(h, blocks, T, U)``.

        Returns:
            torch.Tensor: Tokens of shape ``(B, blocks, T, D)``.
        """
        q = rearrange(self.query(y), "b n t (h d) -> b h n t d", h=self.num_heads) * k.shape[-1] ** -0.5
        weights = torch.softmax(q @ k.mT + bias, dim=-1).to(v.dtype)
        return self.unify(rearrange(weights @ v, "b h n t d -> b n t (h d)"))


def ring_bias(block_size: int, num_heads: int, largest_radius: int) -> torch.Tensor:
    """Where the bias begins: most heads look at one side each of the ring around the hole.

    Args:
        block_size (int): Side length S of a block in patches.
        num_heads (int): Number h of heads.
        largest_radius (int): Largest radius of a hole.

    Returns:
        torch.Tensor: Bias for each offset, in [-5, 0], shape ``((4 * S - 1) ** 2, h)``.

    Example:
        >>> bias = ring_bias(block_size=4, num_heads=8, largest_radius=0)
        >>> bias[:, 0].argmax() == 6 * 15 + 7  # the first head looks at the patch below
        tensor(True)
    """
    reach = 2 * block_size - 1
    offset = torch.arange(-reach, reach + 1)
    offset = torch.cartesian_prod(offset, offset)
    bias = torch.zeros(len(offset), num_heads)
    looking = num_heads if num_heads <= 4 else 3 * num_heads // 4
    for head in range(looking):
        centre = torch.tensor(_RING[head % len(_RING)]) * (largest_radius / 2 + 1)
        bias[:, head] = (-((offset - centre) ** 2).sum(dim=-1) / 2).clamp(min=-5)
    return bias


def _number(offset: torch.Tensor, columns: int) -> torch.Tensor:
    """Number pairs of a row and a column, row by row."""
    return offset[..., 0] * columns + offset[..., 1]
