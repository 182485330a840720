# SPDX-License-Identifier: Apache-2.0
"""The inpainting transformer (sec. 3.1-3.3, eq. 3-5) and the reconstruction of whole images (sec. 3.5): pure torch."""

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from einops import rearrange, reduce, repeat
from timm.layers import Mlp, trunc_normal_
from torch import nn

from anomalib_intra.components.reconstruction import Reconstruction
from anomalib_intra.data.image_range import check_range
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
from anomalib_intra.intra.threads import side_by_side

#: Tokens and their queries, keys and values.
Projected: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


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

    def forward(self, y: torch.Tensor, only: torch.Tensor | None = None, mean: bool = False) -> torch.Tensor:
        """Map a sequence to the next one.

        Args:
            y (torch.Tensor): Sequence of shape ``(B, L * L, D)``.
            only (torch.Tensor | None): Place in the sequence, 0-based, shape ``(B,)``, if no other output is wanted.
            mean (bool): Give the mean of the sequence instead.

        Returns:
            torch.Tensor: Sequence of shape ``(B, L * L, D)``, or ``(B, 1, D)`` with ``only`` or ``mean``.
        """
        x = _as_cast(self.norm1(y))
        k, v = self.attention.key(x), self.attention.value(x)
        if only is not None:
            y, x = _at(y, only), _at(x, only)
        return self.finish(y, self.attention.query(x), k, v, mean)

    def project(self, y: torch.Tensor) -> Projected:
        """Do the part of the block that looks at each token alone; :meth:`finish` does the rest.

        Args:
            y (torch.Tensor): Tokens of shape ``(..., D)``.

        Returns:
            Projected: The tokens and their queries, keys and values.
        """
        x = _as_cast(self.norm1(y))
        return y, self.attention.query(x), self.attention.key(x), self.attention.value(x)

    def finish(
        self, y: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mean: bool = False
    ) -> torch.Tensor:
        """Attend from tokens y with queries q to keys k and values v, then go through the MLP."""
        y = y + self.attention.attend(q, k, v)
        x = _as_cast(self.norm2(y))
        if not mean:
            return y + self.mlp(x)
        # What a linear layer gives for the mean is the mean of what it gives.
        x = self.mlp.act(self.mlp.fc1(x)).mean(dim=1, keepdim=True)
        return y.mean(dim=1, keepdim=True) + self.mlp.fc2(x)


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

        self.draw_weights()

    def draw_weights(self) -> None:
        """Draw all weights anew: truncated normal with a standard deviation of 0.02, biases zero."""
        trunc_normal_(self.position_embedding, std=0.02)
        trunc_normal_(self.inpaint_embedding, std=0.02)
        self.apply(_initialise)

    def compile_blocks(self) -> None:
        """Have torch.compile fuse what the blocks compute; all but the first, which is computed in parts."""
        for block in self.blocks[1:]:
            block.compile()

    def forward(self, images: torch.Tensor) -> Reconstruction:
        """Reconstruct images and hand them on with their originals.

        Args:
            images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)`` or ``(B, 1, H, W)``.

        Returns:
            Reconstruction: Images and reconstructions, ``(B, 3, H, W)`` each.
        """
        images = self._as_colour(images)
        return Reconstruction(images, self.reconstruct(images))

    def reconstruct(self, images: torch.Tensor, window_batch_size: int | None = None) -> torch.Tensor:
        """Inpaint every patch of every image from the window in which it is as central as possible (sec. 3.5).

        With a ``window_shift``, the mean over that window and those around it.

        Args:
            images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``; ``(B, 1, H, W)`` is taken as grey.
            window_batch_size (int | None): Windows inpainted at once at most; bounds the memory. Without gradients,
                torch's threads on a CPU share them out and inpaint them side by side. Defaults to 32 for each thread
                there, 256 at most, and to 256 elsewhere.

        Returns:
            torch.Tensor: Reconstructions of shape ``(B, 3, H, W)``, about in [0, 1], not clipped.

        Raises:
            ValueError: If the images are not a batch of one or three channels, of a size that does not work, or hold
                values that are not finite or not in [0, 1].
        """
        kind = images.device.type
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not torch.is_autocast_enabled(kind):
            return self._reconstruct(images, window_batch_size)
        # Weights are cast once for all batches of windows. Left alone, autocast casts them for every batch: it does not
        # remember them in inference mode, nor as Lightning sets it up.
        autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=True)
        with torch.inference_mode(False), torch.no_grad(), autocast:
            try:
                return self._reconstruct(images, window_batch_size)
            finally:
                torch.clear_autocast_cache()  # an autocast around this one would use them when the weights have changed

    def _reconstruct(self, images: torch.Tensor, window_batch_size: int | None) -> torch.Tensor:
        images = self._as_colour(images)
        self._check(images)
        exporting = torch.compiler.is_compiling()  # for whatever device
        on_cpu = images.device.type == "cpu" and not exporting
        threads = torch.get_num_threads() if on_cpu and self._may_share_out(images) else 1
        if window_batch_size is None:
            window_batch_size = min(32 * threads, 256) if on_cpu else 256
        threads = min(threads, window_batch_size)
        of_a_thread = window_batch_size // threads
        # (asking for the batch size, even to compare it, would tie an exported graph to it)
        if not exporting and len(images) > of_a_thread:
            return torch.cat([self._reconstruct(part, window_batch_size) for part in images.split(of_a_thread)])

        # The projection of a patch is the same in every window, so it is done once per image (eq. 3). Global positions
        # make a whole token the same in every window, and so its queries, keys and values in the first block.
        tokens = self.patch_embedding(patchify(images, self.patch_size))
        batch, rows, columns, _ = tokens.shape
        shared = self.position == "global"
        if shared:
            position = rearrange(self.position_embedding, "(n m) d -> n m d", m=columns)
            seen = self.blocks[0].project(tokens + position)
            hidden = self.blocks[0].project(self.inpaint_embedding + position)

        def inpaint(origins_and_places: Sequence[torch.Tensor]) -> torch.Tensor:
            r, s, t, u = origins_and_places
            place = self._place(r, s, t, u)
            inputs: Sequence[torch.Tensor]
            if shared:
                parts = zip(seen, hidden, strict=True)
                inputs = [self._hide(self._cut(x, r, s), z[t - 1, u - 1], place) for x, z in parts]
            else:
                inputs = self.blocks[0].project(self._embed(self._cut(tokens, r, s), r, s, place))
            inputs = [rearrange(x, "b p l d -> (b p) l d") for x in inputs]
            inpainted = self._inpaint(inputs, repeat(place, "p -> (b p)", b=batch))
            return rearrange(inpainted, "(b p) d -> b p d", b=batch)

        windows = windows_of_inference(rows, columns, self.window_size, self.window_shift, images.device)
        # An exported graph must not depend on the batch size.
        at_once = of_a_thread if exporting else of_a_thread // batch
        if threads > 1:  # as many pieces of work for each thread, all of about one size
            of_each = math.ceil(len(windows[0]) / (threads * at_once))
            at_once = math.ceil(len(windows[0]) / (threads * of_each))
        pieces = zip(*(x.split(at_once) for x in windows), strict=True)
        patches = torch.cat(side_by_side(inpaint, pieces, threads), dim=1)
        grid = reduce(patches, "b (w n m) d -> b n m d", "mean", n=rows, m=columns)
        return unpatchify(grid, self.patch_size)

    def _may_share_out(self, images: torch.Tensor) -> bool:
        """Whether threads may inpaint windows side by side: nothing is wanted of the work but its results."""
        with_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (images, *self.parameters()))
        # Code that was compiled for all threads would be compiled anew for one.
        compiled = any(block._compiled_call_impl is not None for block in self.blocks)
        return not (with_gradients or compiled or torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]

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
        place = self._place(r, s, t, u)
        tokens = rearrange(self.patch_embedding(windows), "b i j d -> b (i j) d")
        return self._inpaint(self.blocks[0].project(self._embed(tokens, r, s, place)), place)

    def _place(self, r: torch.Tensor, s: torch.Tensor, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Place of the hidden patch in its window's sequence, 0-based.

        It stays there instead of moving to the front as in eq. 5: attention does not see the order of a sequence, and
        neither does the readout.
        """
        return (t - r) * self.window_size + u - s

    def _cut(self, x: torch.Tensor, r: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return rearrange(cut_windows(x, r, s, self.window_size), "b p i j d -> b p (i j) d")

    def _embed(self, tokens: torch.Tensor, r: torch.Tensor, s: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Hide a patch of each window and add the positions (eq. 3-5)."""
        r, s = (rearrange(x, "b -> b 1 1") for x in (r, s))
        offset = torch.arange(self.window_size, device=tokens.device)
        i, j = torch.broadcast_tensors(r + rearrange(offset, "l -> 1 l 1"), s + rearrange(offset, "l -> 1 1 l"))
        local = self.position == "local"
        position = f_local(i, j, r, s, self.window_size) if local else f_global(i, j, self.grid[1])
        inpaint = repeat(self.inpaint_embedding, "d -> b d", b=len(place))
        return self._hide(tokens, inpaint, place) + self.position_embedding[rearrange(position, "b i j -> b (i j)") - 1]

    def _hide(self, tokens: torch.Tensor, instead: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Put something else, ``(P, D)``, at a place of each sequence ``(..., P, L * L, D)``."""
        is_hidden = torch.arange(tokens.shape[-2], device=tokens.device) == rearrange(place, "p -> p 1")
        return torch.where(is_hidden[..., None], rearrange(instead, "p d -> p 1 d").to(tokens.dtype), tokens)

    def _inpaint(self, inputs: Sequence[torch.Tensor], place: torch.Tensor) -> torch.Tensor:
        """Go through the blocks, from what the first one projected (sec. 3.3), and read the hidden patch out."""
        depth = len(self.blocks)
        for_long_residuals: list[torch.Tensor] = []
        for n, block in enumerate(self.blocks):
            # Of the last output, only what is read out is computed.
            last = n == depth - 1
            only = place if self.readout == "token" and last else None
            mean = self.readout == "mean" and last
            if n == 0:
                y, q, k, v = inputs
                y = block.finish(*((y, q) if only is None else (_at(y, only), _at(q, only))), k, v, mean)
            else:
                if self.long_residuals and n >= depth - depth // 2:
                    y = y + for_long_residuals.pop()
                y = block(y, only, mean)
            if n < depth // 2:
                for_long_residuals.append(y)
        return self.to_pixels(rearrange(y, "b 1 d -> b d"))

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


def _at(sequence: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    return sequence[torch.arange(len(place), device=place.device), place][:, None]


def _as_cast(x: torch.Tensor) -> torch.Tensor:
    """Under autocast, cast once what several linear layers would cast each for themselves."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _check_option(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        msg = f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}."
        raise ValueError(msg)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
