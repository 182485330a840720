# SPDX-License-Identifier: Apache-2.0
"""The inpainting transformer (sec. 3.1-3.3, eq. 3-5) and the reconstruction of whole images (sec. 3.5): pure torch."""

from typing import Literal, NamedTuple

import torch
from einops import rearrange, repeat
from timm.layers import Mlp, trunc_normal_
from torch import nn

from anomalib_intra.attention import MultiheadFeatureSelfAttention, MultiheadSelfAttention
from anomalib_intra.grid import centred_origin, check_image_size, cut_windows, f_global, f_local, patchify, unpatchify
from anomalib_intra.image_range import check_range


class Reconstruction(NamedTuple):
    """What the model gives for a batch of images.

    Args:
        image (torch.Tensor): The images it saw, in [0, 1], shape ``(B, 3, H, W)``.
        reconstruction (torch.Tensor): The images it expected, shape ``(B, 3, H, W)``.
    """

    image: torch.Tensor
    reconstruction: torch.Tensor


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: attention, then an MLP D -> 4D -> D, each with a residual connection (sec. 3.3).

    Args:
        embed_dim (int): Latent dimension D.
        attention (nn.Module): Self-attention on sequences of that dimension.
    """

    def __init__(self, embed_dim: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim)
        self.attention = attention
        self.norm2 = nn.LayerNorm(embed_dim)
        self.mlp = Mlp(embed_dim, 4 * embed_dim)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Map a sequence of shape ``(B, L * L, D)`` to one of the same shape."""
        y = y + self.attention(self.norm1(y))
        return y + self.mlp(self.norm2(y))


class InpaintingTransformer(nn.Module):
    """Inpaints a hidden patch from the other patches of a window, and whole images patch by patch.

    Needs neither Lightning nor anomalib.

    Args:
        image_size (tuple[int, int]): Height and width of the images in pixels. Global positions tie the model to it;
            with ``position="local"`` images of any size that works can be reconstructed.
        patch_size (int): Side length K of a patch in pixels.
        window_size (int): Side length L of a window in patches.
        embed_dim (int): Latent dimension D.
        depth (int): Number n of transformer blocks.
        num_heads (int): Number h of attention heads.
        feature_dim (int | None): Dimension F of queries and keys in MFSA. Defaults to ``embed_dim // 2``.
        attention (str): ``"mfsa"`` (eq. 10) or ``"msa"`` (eq. 6).
        position (str): ``"global"`` (eq. 2) or ``"local"`` (eq. 1).
        long_residuals (bool): Add the output of block i to the input of block n - 1 - i, for i < n // 2.
        readout (str): ``"mean"`` over the sequence or the hidden patch's ``"token"``.

    Raises:
        ValueError: If the sizes do not fit together, or an option has no such value.

    Example:
        >>> model = InpaintingTransformer((64, 96), patch_size=16, window_size=3, embed_dim=32, depth=2, num_heads=4)
        >>> model.reconstruct(torch.rand(2, 3, 64, 96)).shape
        torch.Size([2, 3, 64, 96])
    """

    def __init__(
        self,
        image_size: tuple[int, int] = (256, 256),
        patch_size: int = 16,
        window_size: int = 7,
        embed_dim: int = 512,
        depth: int = 13,
        num_heads: int = 8,
        feature_dim: int | None = None,
        attention: Literal["mfsa", "msa"] = "mfsa",
        position: Literal["global", "local"] = "global",
        long_residuals: bool = True,
        readout: Literal["mean", "token"] = "mean",
    ) -> None:
        super().__init__()
        _check_option("attention", attention, ("mfsa", "msa"))
        _check_option("position", position, ("global", "local"))
        _check_option("readout", readout, ("mean", "token"))
        height, width = image_size
        check_image_size(height, width, patch_size, window_size)

        self.patch_size = patch_size
        self.window_size = window_size
        self.grid = (height // patch_size, width // patch_size)
        self.position = position
        self.long_residuals = long_residuals
        self.readout = readout

        def self_attention() -> nn.Module:
            if attention == "msa":
                return MultiheadSelfAttention(embed_dim, num_heads)
            return MultiheadFeatureSelfAttention(embed_dim, num_heads, feature_dim or embed_dim // 2)

        patch_dim = 3 * patch_size**2
        positions = window_size**2 if position == "local" else self.grid[0] * self.grid[1]
        self.patch_embedding = nn.Linear(patch_dim, embed_dim, bias=False)
        self.position_embedding = nn.Parameter(torch.zeros(positions, embed_dim))
        self.inpaint_embedding = nn.Parameter(torch.zeros(embed_dim))
        self.blocks = nn.ModuleList(TransformerBlock(embed_dim, self_attention()) for _ in range(depth))
        self.to_pixels = nn.Linear(embed_dim, patch_dim)

        trunc_normal_(self.position_embedding, std=0.02)
        trunc_normal_(self.inpaint_embedding, std=0.02)
        self.apply(_initialise)

    def forward(self, images: torch.Tensor) -> Reconstruction:
        """Reconstruct images and hand them on with their originals.

        Args:
            images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)`` or ``(B, 1, H, W)``.

        Returns:
            Reconstruction: Images and reconstructions, ``(B, 3, H, W)`` each.
        """
        images = self._as_colour(images)
        return Reconstruction(images, self.reconstruct(images))

    def reconstruct(self, images: torch.Tensor, window_batch_size: int = 256) -> torch.Tensor:
        """Inpaint every patch of every image from the window in which it is as central as possible (sec. 3.5).

        Args:
            images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``; ``(B, 1, H, W)`` is taken as grey.
            window_batch_size (int): Windows inpainted at once (at least one of each image); bounds the memory.

        Returns:
            torch.Tensor: Reconstructions of shape ``(B, 3, H, W)``, about in [0, 1], not clipped.

        Raises:
            ValueError: If the images are not a batch of one or three channels, of a size that does not work, or hold
                values that are not finite or not in [0, 1].
        """
        images = self._as_colour(images)
        self._check(images)
        # The projection of a patch is the same in every window, so it is done once per image (eq. 3).
        tokens = self.patch_embedding(patchify(images, self.patch_size))
        batch, rows, columns, _ = tokens.shape

        position = torch.arange(rows * columns, device=images.device)
        t, u = position // columns + 1, position % columns + 1
        r = centred_origin(t, rows, self.window_size)
        s = centred_origin(u, columns, self.window_size)

        # An exported graph must not depend on the batch size.
        at_once = window_batch_size if torch.compiler.is_compiling() else max(1, window_batch_size // batch)
        patches = []
        for t_, u_, r_, s_ in zip(*(x.split(at_once) for x in (t, u, r, s)), strict=True):
            windows = rearrange(cut_windows(tokens, r_, s_, self.window_size), "b p i j d -> (b p) i j d")
            where = (repeat(x, "p -> (b p)", b=batch) for x in (r_, s_, t_, u_))
            patches.append(rearrange(self._inpaint(windows, *where), "(b p) d -> b p d", b=batch))
        grid = rearrange(torch.cat(patches, dim=1), "b (n m) d -> b n m d", n=rows, m=columns)
        return unpatchify(grid, self.patch_size)

    def inpaint(
        self, windows: torch.Tensor, r: torch.Tensor, s: torch.Tensor, t: torch.Tensor, u: torch.Tensor
    ) -> torch.Tensor:
        """Inpaint the patch at (t, u) in each window, seeing only the other patches (sec. 3.1-3.3).

        Args:
            windows (torch.Tensor): Windows of flattened patches, shape ``(B, L, L, K * K * 3)``.
            r (torch.Tensor): Row of each window's upper left patch in its image, 1-based, shape ``(B,)``.
            s (torch.Tensor): Its column, 1-based, shape ``(B,)``.
            t (torch.Tensor): Row of the patch to inpaint in its image, 1-based, shape ``(B,)``.
            u (torch.Tensor): Its column, 1-based, shape ``(B,)``.

        Returns:
            torch.Tensor: Inpainted patches, flattened, shape ``(B, K * K * 3)``.
        """
        return self._inpaint(self.patch_embedding(windows), r, s, t, u)

    def _inpaint(
        self, tokens: torch.Tensor, r: torch.Tensor, s: torch.Tensor, t: torch.Tensor, u: torch.Tensor
    ) -> torch.Tensor:
        r, s, t, u = (rearrange(x, "b -> b 1 1") for x in (r, s, t, u))
        offset = torch.arange(self.window_size, device=tokens.device)
        i, j = torch.broadcast_tensors(r + rearrange(offset, "l -> 1 l 1"), s + rearrange(offset, "l -> 1 1 l"))
        is_hidden = rearrange((i == t) & (j == u), "b i j -> b i j 1")
        local = self.position == "local"
        position = f_local(i, j, r, s, self.window_size) if local else f_global(i, j, self.grid[1])

        # Eq. 3-5. The hidden patch stays at its place instead of moving to the front: attention does not see the order
        # of a sequence, and neither does the readout.
        tokens = torch.where(is_hidden, self.inpaint_embedding.to(tokens.dtype), tokens)
        y = rearrange(tokens + self.position_embedding[position - 1], "b i j d -> b (i j) d")

        depth = len(self.blocks)
        outputs: list[torch.Tensor] = []
        for n, block in enumerate(self.blocks):
            if self.long_residuals and n >= depth - depth // 2:
                y = y + outputs[depth - 1 - n]
            y = block(y)
            outputs.append(y)

        if self.readout == "mean":
            vector = y.mean(dim=1)
        else:
            vector = (y * rearrange(is_hidden, "b i j 1 -> b (i j) 1")).sum(dim=1)
        return self.to_pixels(vector)

    @staticmethod
    def _as_colour(images: torch.Tensor) -> torch.Tensor:
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            msg = f"Expected images of shape (B, 3, H, W) or (B, 1, H, W), got {tuple(images.shape)}."
            raise ValueError(msg)
        return images if images.shape[1] == 3 else repeat(images, "b 1 h w -> b c h w", c=3)

    def _check(self, images: torch.Tensor) -> None:
        height, width = images.shape[-2:]
        check_image_size(height, width, self.patch_size, self.window_size)
        trained = tuple(side * self.patch_size for side in self.grid)
        if self.position == "global" and (height, width) != trained:
            msg = (
                f"Images of {height} x {width} pixels reached a model whose global positions are for "
                f"{trained[0]} x {trained[1]}: resize the images, build the model with image_size=({height}, {width}), "
                'or use position="local".'
            )
            raise ValueError(msg)
        if not torch.compiler.is_compiling():
            check_range(images)


def _check_option(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        msg = f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}."
        raise ValueError(msg)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
