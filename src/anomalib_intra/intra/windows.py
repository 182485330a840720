# SPDX-License-Identifier: Apache-2.0
"""How training windows are sampled and cut (sec. 3.4 and 4.1)."""

from dataclasses import dataclass

import torch
from einops import rearrange

from anomalib_intra.data.samples import as_fractions
from anomalib_intra.data.symmetries import Symmetries, apply_symmetries, sample_symmetries
from anomalib_intra.intra.grid import centred_origin, patchify


@dataclass(kw_only=True)
class WindowBatch(Symmetries):
    """The windows of one training step, still uncut.

    Args:
        image (torch.Tensor): The images they come from, as bytes or in [0, 1], shape ``(P, 3, H, W)``.
        index (torch.Tensor): Which image, shape ``(B,)``.
        r (torch.Tensor): Row of the window's upper left patch, 1-based, shape ``(B,)``.
        s (torch.Tensor): Its column, 1-based, shape ``(B,)``.
        t (torch.Tensor): Row of the hidden patch, 1-based, shape ``(B,)``.
        u (torch.Tensor): Its column, 1-based, shape ``(B,)``.

    All positions are those in the transposed and flipped image.
    """

    image: torch.Tensor
    index: torch.Tensor
    r: torch.Tensor
    s: torch.Tensor
    t: torch.Tensor
    u: torch.Tensor

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.index)


def sample_windows(
    images: torch.Tensor,
    windows_per_image: int,
    patch_size: int,
    window_size: int,
    augment: bool,
    generator: torch.Generator,
    centred: bool = False,
) -> WindowBatch:
    """Draw random windows with a random hidden patch from every image, in random order.

    With ``centred``, the hidden patch is drawn from the whole image, and its window is the one that inpaints it when an
    image is reconstructed (eq. 13-15). The paper draws the window first, and then the patch within it.

    With ``augment`` every window's image is turned and flipped at random: a transposition followed by flips gives each
    of the eight symmetries of a square with equal chance. Images that are not square are only flipped (which includes
    the half turn), since a quarter turn would leave their grid.

    Args:
        images (torch.Tensor): Images, as bytes or in [0, 1], shape ``(P, 3, H, W)``.
        windows_per_image (int): Windows drawn from each image.
        patch_size (int): Side length K of a patch in pixels.
        window_size (int): Side length L of a window in patches.
        augment (bool): Turn and flip.
        generator (torch.Generator): Source of randomness, on the CPU.
        centred (bool): Draw the windows of inference.

    Returns:
        WindowBatch: All ``P * windows_per_image`` windows.

    Example:
        >>> samples = sample_windows(torch.rand(2, 3, 64, 64), 5, 16, 3, True, torch.Generator().manual_seed(0))
        >>> len(samples), int(samples.r.min()) >= 1, int(samples.r.max()) <= 2
        (10, True, True)
    """
    rows, columns = (side // patch_size for side in images.shape[-2:])
    count = len(images) * windows_per_image

    def uniform(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high + 1, (count,), generator=generator)

    order = torch.randperm(count, generator=generator)
    if centred:
        t, u = uniform(1, rows), uniform(1, columns)
        r, s = centred_origin(t, rows, window_size), centred_origin(u, columns, window_size)
    else:
        r, s = uniform(1, rows - window_size + 1), uniform(1, columns - window_size + 1)
        t, u = r + uniform(0, window_size - 1), s + uniform(0, window_size - 1)
    return WindowBatch(
        image=images,
        index=order % len(images),
        r=r,
        s=s,
        t=t,
        u=u,
        **sample_symmetries(count, rows == columns, augment, generator),
    )


def cut_training_windows(batch: WindowBatch, patch_size: int, window_size: int) -> torch.Tensor:
    """Cut the windows of a step, on whatever device the images are.

    Args:
        batch (WindowBatch): Images and samples.
        patch_size (int): Side length K of a patch in pixels.
        window_size (int): Side length L of a window in patches.

    Returns:
        torch.Tensor: Windows of flattened patches, shape ``(B, L, L, K * K * 3)``.

    Example:
        >>> samples = sample_windows(torch.rand(2, 3, 64, 64), 5, 16, 3, True, torch.Generator().manual_seed(0))
        >>> cut_training_windows(samples, 16, 3).shape
        torch.Size([10, 3, 3, 768])
    """
    # Undo the flips, then the transposition, to find where the window lies in the image as it was read.
    rows, columns = (side // patch_size for side in batch.image.shape[-2:])
    r = torch.where(batch.flipped_v, rows - window_size + 2 - batch.r, batch.r)
    s = torch.where(batch.flipped_h, columns - window_size + 2 - batch.s, batch.s)
    r, s = torch.where(batch.transposed, s, r), torch.where(batch.transposed, r, s)

    pixel = torch.arange(window_size * patch_size, device=batch.image.device)
    y = rearrange((r - 1) * patch_size, "b -> b 1 1") + rearrange(pixel, "k -> 1 k 1")
    x = rearrange((s - 1) * patch_size, "b -> b 1 1") + rearrange(pixel, "k -> 1 1 k")
    pixels = batch.image[rearrange(batch.index, "b -> b 1 1"), :, y, x]
    windows = rearrange(as_fractions(pixels), "b h w c -> b c h w")

    return patchify(apply_symmetries(windows, batch), patch_size)
