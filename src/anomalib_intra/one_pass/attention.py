# SPDX-License-Identifier: Apache-2.0
"""Attention of all patches of an image to what lies outside the hole around each: near patches alone, far ones pooled.

The patches are taken in square blocks. A query sees the patches of its own block and of the eight around it one by one,
and each other block as one token, the mean of its patches. The work on near patches grows with the number of patches,
that on far blocks with its square: with the defaults, a pixel costs 14 % more at 512 x 512 than at 256 x 256, and 1.7
times as much at 1024 x 1024.
"""

import torch
from einops import rearrange, repeat
from torch import nn
from torch.nn.functional import embedding, pad

from anomalib_intra.one_pass.fast_attention import FastAttention

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

        # Rows and columns of patches, counted from the upper left one of a block: the block's own, and the near ones.
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

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """Take the mean of each block's patches.

        Args:
            tokens (torch.Tensor): Tokens in blocks, shape ``(B, blocks, S * S, D)``.

        Returns:
            torch.Tensor: Tokens of shape ``(B, blocks, D)``.
        """
        inside = rearrange(self.inside, "n t -> n t 1")
        return (tokens * inside).sum(dim=2) / inside.sum(dim=1)

    def spread(self, near: torch.Tensor, far: torch.Tensor, radii: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Spread relative position biases over all pairs of a query and what it sees.

        Args:
            near (torch.Tensor): Bias for each offset of a patch, shape ``(near_offsets, depth * heads)``.
            far (torch.Tensor): Bias for each offset of a block, shape ``(far_offsets, depth * heads)``.
            radii (int): Number R of queries that each patch has.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: Biases of shapes ``(depth * heads, R * S * S, 9 * S * S)`` and
            ``(depth * heads, blocks, blocks)``.
        """
        near = repeat(embedding(self.near_offset, near), "t u h -> h (r t) u", r=radii)
        return near, rearrange(embedding(self.far_offset, far), "n m h -> h n m").contiguous()

    def mask(self, radii: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores, so that no query sees the hole around it, the near blocks pooled or the outside.

        Args:
            radii (tuple[int, ...]): Radii of the holes, R of them.
            dtype (torch.dtype): Type of the scores.

        Returns:
            torch.Tensor: 0, or minus infinity for what is hidden, shape ``(blocks, R * S * S, 9 * S * S + blocks)``.
        """
        holes = torch.tensor(radii, device=self.near_distance.device)
        outside = rearrange(self.near_distance, "t u -> 1 t u") > rearrange(holes, "r -> r 1 1")
        near = rearrange(self.near_visible, "n u -> n 1 u") & rearrange(outside, "r t u -> 1 (r t) u")
        far = repeat(self.far_visible, "n m -> n rt m", rt=near.shape[1])
        visible = torch.cat([near, far], dim=-1)
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, -torch.inf)


class CrossAttention(nn.Module):
    """Multihead cross-attention from queries in blocks to keys and values that were projected before.

    Args:
        embed_dim (int): Latent dimension D.
        num_heads (int): Number h of heads; divides D.
    """

    #: Attend plainly on a CPU, too: to count the work, or to time it.
    plainly = False

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(embed_dim, embed_dim)
        self.unify = nn.Linear(embed_dim, embed_dim)

    def forward(self, y: torch.Tensor, *seen: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            y (torch.Tensor): Queries of shape ``(B, blocks, T, D)``.
            *seen (torch.Tensor): Keys and values, biases and mask as in :func:`attend`.

        Returns:
            torch.Tensor: Tokens of shape ``(B, blocks, T, D)``.
        """
        q = rearrange(self.query(y), "b n t (h d) -> b h n t d", h=self.num_heads)
        attended = (attend_fast if _on_cpu(q) and not self.plainly else attend)(q * q.shape[-1] ** -0.5, *seen)
        return self.unify(rearrange(attended, "b h n t d -> b n t (h d)"))


def attend(
    q: torch.Tensor,
    near: torch.Tensor,
    far: torch.Tensor,
    near_bias: torch.Tensor,
    far_bias: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Attend from the patches of each block to near patches and far blocks.

    Args:
        q (torch.Tensor): Queries, scaled, shape ``(B, h, I * J, T, d)`` for I x J blocks.
        near (torch.Tensor): Keys and values of the patches, shape ``(B, h, 2, I, J, S * S, d)``.
        far (torch.Tensor): Keys and values of the blocks, shape ``(B, h, 2, I * J, d)``.
        near_bias (torch.Tensor): Bias of the near patches, shape ``(h, T, 9 * S * S)``.
        far_bias (torch.Tensor): Bias of the blocks, shape ``(h, I * J, I * J)``.
        mask (torch.Tensor): 0, or minus infinity for what is hidden, shape ``(I * J, T, 9 * S * S + I * J)``.

    Returns:
        torch.Tensor: Tokens of shape ``(B, h, I * J, T, d)``.
    """
    i, j = near.shape[3:5]
    near = pad(near, (0, 0, 0, 0, 1, 1, 1, 1))
    around = [near[..., di : di + i, dj : dj + j, :, :] for di in range(3) for dj in range(3)]
    near = rearrange(torch.cat(around, dim=-2), "b h kv i j u d -> kv b h (i j) u d")
    k, v = torch.cat([near, repeat(far, "b h kv m d -> kv b h n m d", n=i * j)], dim=-2)
    near_bias = repeat(near_bias, "h t u -> h n t u", n=i * j)
    far_bias = repeat(far_bias, "h n m -> h n t m", t=q.shape[-2])
    # Where a weight is 0, what it is multiplied by changes nothing, not even the rounding.
    weights = torch.softmax(q @ k.mT + torch.cat([near_bias, far_bias], dim=-1) + mask, dim=-1)
    return weights.to(v.dtype) @ v


def attend_fast(
    q: torch.Tensor,
    near: torch.Tensor,
    far: torch.Tensor,
    near_bias: torch.Tensor,
    far_bias: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Do what :func:`attend` does, in less time on a CPU."""
    batch_and_head = (x.flatten(0, 1).contiguous() for x in (q, near, far))
    result = FastAttention.apply(*batch_and_head, near_bias, far_bias, mask, torch.is_grad_enabled())
    return result.view(q.shape)


def _on_cpu(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]


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
