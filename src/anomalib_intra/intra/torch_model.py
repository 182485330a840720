# SPDX-License-Identifier: Apache-2.0
"""The inpainting transformer (sec. 3.1-3.3, eq. 3-5) and the reconstruction of whole images (sec. 3.5): pure torch."""

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange, reduce, repeat
from timm.layers import Mlp, trunc_normal_
from torch import nn

from anomalib_intra.components.arguments import check_counts
from anomalib_intra.components.reconstruction import Reconstruction
from anomalib_intra.data.image_range import as_colour, check_range
from anomalib_intra.intra.attention import MultiheadFeatureSelfAttention, MultiheadSelfAttention
from anomalib_intra.intra.grid import (
    check_image_size,
    cut_windows,
    f_global,
    f_local,
    patchify,
    unpatchify,
    windows_of_inference,
)


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: attention, then an MLP D -> 4D -> D, each with a residual connection (sec. 3.3).

    Args:
        embed_dim (int): Latent dimension D.
        attention (MultiheadSelfAttention): Self-attention on sequences of that dimension.
    """

    def __init__(self, embed_dim: int, attention: MultiheadSelfAttention) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim)
        self.attention = attention
        self.norm2 = nn.LayerNorm(embed_dim)
        self.mlp = Mlp(embed_dim, 4 * embed_dim)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Map a sequence of shape ``(B, L * L, D)`` to the next one."""
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
        long_residuals (bool): Add the output of block i to the input of block n - 1 - i, for i < (n - 1) // 2. The
            paper has 13 blocks, of which the middle one stands alone; of an even number, the two in the middle do: what
            one gives is the other's input already.
        readout (str): ``"mean"`` over the sequence or the hidden patch's ``"token"``.
        window_shift (int): Reconstruct each patch as the mean of what all windows give whose centre is up to this many
            patches away from it, ``(2 * window_shift + 1) ** 2`` of them. 0 takes the central one (sec. 3.5).

    Raises:
        ValueError: If the sizes do not fit together, or an option has no such value.

    Example:
        >>> model = InpaintingTransformer((64, 96), patch_size=16, window_size=3, embed_dim=32, depth=2, num_heads=4)
        >>> model.reconstruct(torch.rand(2, 3, 64, 96)).shape
        torch.Size([2, 3, 64, 96])
    """

    blocks: Sequence[TransformerBlock]
    #: Whether, of an even number of blocks, the input of the second in the middle is doubled: the output of the first
    #: is added to itself. Models trained by older versions do that, and so does what was pickled by one.
    doubles_middle = True

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
        window_shift: int = 0,
    ) -> None:
        super().__init__()
        _check_option("attention", attention, ("mfsa", "msa"))
        _check_option("position", position, ("global", "local"))
        _check_option("readout", readout, ("mean", "token"))
        sizes = {"patch_size": patch_size, "window_size": window_size, "embed_dim": embed_dim, "num_heads": num_heads}
        check_counts(**sizes, depth=depth, **({} if feature_dim is None else {"feature_dim": feature_dim}))
        height, width = image_size
        check_image_size(height, width, patch_size, window_size)
        if not 0 <= window_shift <= window_size // 2:
            msg = f"window_shift must be in 0 .. {window_size // 2} for windows of {window_size}, got {window_shift}."
            raise ValueError(msg)

        self.patch_size = patch_size
        self.window_size = window_size
        self.grid = (height // patch_size, width // patch_size)
        self.position = position
        self.long_residuals = long_residuals
        self.readout = readout
        self.window_shift = window_shift
        self.doubles_middle = False

        def self_attention() -> MultiheadSelfAttention:
            if attention == "msa":
                return MultiheadSelfAttention(embed_dim, num_heads)
            return MultiheadFeatureSelfAttention(embed_dim, num_heads, feature_dim or embed_dim // 2)

        patch_dim = 3 * patch_size**2
        positions = window_size**2 if position == "local" else self.grid[0] * self.grid[1]
        self.patch_embedding = nn.Linear(patch_dim, embed_dim, bias=False)
        self.position_embedding = nn.Parameter(torch.zeros(positions, embed_dim))
        self.inpaint_embedding = nn.Parameter(torch.zeros(embed_dim))
        blocks = nn.ModuleList(TransformerBlock(embed_dim, self_attention()) for _ in range(depth))
        self.blocks = blocks  # type: ignore[assignment]  # a ModuleList does not tell the type of its modules
        self.to_pixels = nn.Linear(embed_dim, patch_dim)

        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew: truncated normal with a standard deviation of 0.02, biases zero."""
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
        images = as_colour(images)
        return Reconstruction(images, self.reconstruct(images))

    def reconstruct(self, images: torch.Tensor, window_batch_size: int = 64) -> torch.Tensor:
        """Inpaint every patch of every image from the window in which it is as central as possible (sec. 3.5).

        With a ``window_shift``, the mean over that window and those around it.

        Args:
            images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``; ``(B, 1, H, W)`` is taken as grey.
            window_batch_size (int): Windows inpainted at once, one of each image at least; bounds the memory.

        Returns:
            torch.Tensor: Reconstructions of shape ``(B, 3, H, W)``, about in [0, 1], not clipped.

        Raises:
            ValueError: If the images are not a batch of one or three channels, of a size that does not work, or hold
                values that are not finite or not in [0, 1].
        """
        images = as_colour(images)
        self._check(images)
        patches = patchify(images, self.patch_size)
        batch, rows, columns, _ = patches.shape
        # An exported graph must not depend on the batch size.
        of_each_image = window_batch_size if torch.compiler.is_compiling() else max(1, window_batch_size // batch)
        windows = windows_of_inference(rows, columns, self.window_size, self.window_shift, images.device)

        inpainted = []
        for part in zip(*(x.split(of_each_image) for x in windows), strict=True):
            cut = cut_windows(patches, part[0], part[1], self.window_size)
            r, s, t, u = (repeat(x, "p -> (b p)", b=batch) for x in part)
            inpainted.append(self.inpaint(rearrange(cut, "b p i j d -> (b p) i j d"), r, s, t, u))
        of_images = torch.cat([rearrange(x, "(b p) d -> b p d", b=batch) for x in inpainted], dim=1)
        grid = reduce(of_images, "b (w n m) d -> b n m d", "mean", n=rows, m=columns)
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
        # The hidden patch stays at its place instead of moving to the front as in eq. 5: attention does not see the
        # order of a sequence, and neither does the readout.
        place = (t - r) * self.window_size + u - s
        y = self._embed(windows, r, s, place)
        depth = len(self.blocks)
        outputs: list[torch.Tensor] = []
        for n, block in enumerate(self.blocks):
            source = depth - 1 - n
            if self.long_residuals and (source < n - 1 or (source == n - 1 and self.doubles_middle)):
                y = y + outputs[source]
            y = block(y)
            outputs.append(y)
        mean = self.readout == "mean"
        return self.to_pixels(y.mean(dim=1) if mean else y[torch.arange(len(y), device=y.device), place])

    def _embed(self, windows: torch.Tensor, r: torch.Tensor, s: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Embed patches and positions, and hide one patch of each window (eq. 3-5); ``(B, L * L, D)``."""
        offset = torch.arange(self.window_size, device=windows.device)
        r, s = rearrange(r, "b -> b 1 1"), rearrange(s, "b -> b 1 1")
        i, j = torch.broadcast_tensors(r + rearrange(offset, "l -> 1 l 1"), s + rearrange(offset, "l -> 1 1 l"))
        local = self.position == "local"
        position = f_local(i, j, r, s, self.window_size) if local else f_global(i, j, self.grid[1])

        tokens = rearrange(self.patch_embedding(windows), "b i j d -> b (i j) d")
        is_hidden = torch.arange(tokens.shape[1], device=tokens.device) == rearrange(place, "b -> b 1")
        tokens = torch.where(is_hidden[..., None], self.inpaint_embedding.to(tokens.dtype), tokens)
        return tokens + self.position_embedding[rearrange(position, "b i j -> b (i j)") - 1]

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
