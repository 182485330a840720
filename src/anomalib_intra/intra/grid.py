# SPDX-License-Identifier: Apache-2.0
"""The patch grid: patches, positions and windows (eq. 1, 2 and 13-15).

Positions are the paper's: 1-based, ``(1, 1)`` is the upper left patch of the image. They become tensor indices in one
place only, :func:`cut_windows`.
"""

import torch
from einops import rearrange


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Split images into a grid of flattened square patches (sec. 3.1).

    Args:
        images (torch.Tensor): Images of shape ``(B, C, N * K, M * K)``.
        patch_size (int): Side length K of a patch in pixels.

    Returns:
        torch.Tensor: Patches of shape ``(B, N, M, K * K * C)``.

    Example:
        >>> patchify(torch.zeros(2, 3, 32, 48), patch_size=16).shape
        torch.Size([2, 2, 3, 768])
    """
    return rearrange(images, "b c (n k1) (m k2) -> b n m (k1 k2 c)", k1=patch_size, k2=patch_size)


def unpatchify(patches: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Put a grid of flattened patches together again: the inverse of :func:`patchify`.

    Args:
        patches (torch.Tensor): Patches of shape ``(B, N, M, K * K * C)``.
        patch_size (int): Side length K of a patch in pixels.

    Returns:
        torch.Tensor: Images of shape ``(B, C, N * K, M * K)``.

    Example:
        >>> images = torch.rand(1, 3, 32, 32)
        >>> torch.equal(unpatchify(patchify(images, 16), 16), images)
        True
    """
    return rearrange(patches, "b n m (k1 k2 c) -> b c (n k1) (m k2)", k1=patch_size, k2=patch_size)


def f_local(i: torch.Tensor, j: torch.Tensor, r: torch.Tensor, s: torch.Tensor, window_size: int) -> torch.Tensor:
    """Position of patch (i, j) counted within the window at (r, s) (eq. 1).

    Args:
        i (torch.Tensor): Patch rows, 1-based.
        j (torch.Tensor): Patch columns, 1-based.
        r (torch.Tensor): Row of the window's upper left patch, 1-based.
        s (torch.Tensor): Column of the window's upper left patch, 1-based.
        window_size (int): Side length L of the window in patches.

    Returns:
        torch.Tensor: Positions in ``1 .. L * L``.

    Example:
        >>> f_local(torch.tensor(4), torch.tensor(3), torch.tensor(3), torch.tensor(2), window_size=3)
        tensor(5)
    """
    return (i - r) * window_size + j - s + 1


def f_global(i: torch.Tensor, j: torch.Tensor, columns: int) -> torch.Tensor:
    """Position of patch (i, j) counted within the whole image (eq. 2).

    The paper multiplies by N, the number of rows, which numbers the patches one by one only where images are square;
    the stride of a row is M, the number of columns.

    Args:
        i (torch.Tensor): Patch rows, 1-based.
        j (torch.Tensor): Patch columns, 1-based.
        columns (int): Number M of patch columns in the image.

    Returns:
        torch.Tensor: Positions in ``1 .. N * M``.

    Example:
        >>> f_global(torch.tensor(2), torch.tensor(1), columns=5)
        tensor(6)
    """
    return (i - 1) * columns + j


def centred_origin(c: torch.Tensor, length: int, window_size: int) -> torch.Tensor:
    """Where the window begins along one axis so that patch c is as central as the border allows (eq. 13-15).

    Args:
        c (torch.Tensor): Positions of the hidden patch along the axis, 1-based (t or u).
        length (int): Number of patches along the axis (N or M).
        window_size (int): Side length L of the window in patches.

    Returns:
        torch.Tensor: Position of the window's first patch along the axis, 1-based (r or s).

    Example:
        >>> centred_origin(torch.arange(1, 9), length=8, window_size=3)
        tensor([1, 1, 2, 3, 4, 5, 6, 6])
    """
    g = (c - window_size // 2).clamp(min=1)
    return g - (g + window_size - length - 1).clamp(min=0)


def windows_of_inference(
    rows: int, columns: int, window_size: int, shift: int = 0, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """List the windows from which a whole image is inpainted: one for each patch (sec. 3.5), or with a shift more.

    Args:
        rows (int): Number N of patch rows in the image.
        columns (int): Number M of patch columns.
        window_size (int): Side length L of a window in patches.
        shift (int): Take the window of eq. 13-15 also moved by up to this many patches up, down and sideways, as far as
            border and patch allow.
        device (torch.device | None): Where the result is wanted.

    Returns:
        tuple: Rows r and columns s of the windows' upper left patches, rows t and columns u of their hidden patches,
        all 1-based and of shape ``((2 * shift + 1) ** 2 * N * M,)``: for each move, the patches row by row.

    Example:
        >>> r, s, t, u = windows_of_inference(3, 4, window_size=3)
        >>> s
        tensor([1, 1, 2, 2, 1, 1, 2, 2, 1, 1, 2, 2])
        >>> len(windows_of_inference(3, 4, window_size=3, shift=1)[0])
        108
    """
    moves = torch.arange(-shift, shift + 1, device=device)
    t, u = (torch.arange(1, length + 1, device=device) for length in (rows, columns))
    down, right, t, u = (x.flatten() for x in torch.meshgrid(moves, moves, t, u, indexing="ij"))

    def moved(c: torch.Tensor, length: int, by: torch.Tensor) -> torch.Tensor:
        origin = centred_origin(c, length, window_size) + by
        lowest, highest = (c - window_size + 1).clamp(min=1), c.clamp(max=length - window_size + 1)
        return torch.minimum(torch.maximum(origin, lowest), highest)

    return moved(t, rows, down), moved(u, columns, right), t, u


def cut_windows(tokens: torch.Tensor, r: torch.Tensor, s: torch.Tensor, window_size: int) -> torch.Tensor:
    """Cut the windows at (r, s) out of every grid of a batch.

    Args:
        tokens (torch.Tensor): Patches or their embeddings, shape ``(B, N, M, D)``.
        r (torch.Tensor): Rows of the upper left patches, 1-based, shape ``(P,)``.
        s (torch.Tensor): Columns of the upper left patches, 1-based, shape ``(P,)``.
        window_size (int): Side length L of a window in patches.

    Returns:
        torch.Tensor: Windows of shape ``(B, P, L, L, D)``.

    Example:
        >>> tokens = torch.arange(12).reshape(1, 3, 4, 1)
        >>> cut_windows(tokens, torch.tensor([2]), torch.tensor([3]), window_size=2).flatten()
        tensor([ 6,  7, 10, 11])
    """
    offset = torch.arange(window_size, device=r.device) - 1
    rows = rearrange(r, "p -> p 1 1") + rearrange(offset, "l -> 1 l 1")
    columns = rearrange(s, "p -> p 1 1") + rearrange(offset, "l -> 1 1 l")
    return tokens[:, rows, columns]


def check_image_size(height: int, width: int, patch_size: int, window_size: int) -> None:
    """Refuse an image size that is no grid of patches or does not hold a window.

    Args:
        height (int): Image height in pixels.
        width (int): Image width in pixels.
        patch_size (int): Side length K of a patch in pixels.
        window_size (int): Side length L of a window in patches.

    Raises:
        ValueError: If ``patch_size`` does not divide the size or the window does not fit; names the nearest size that
            works.

    Example:
        >>> check_image_size(256, 320, patch_size=16, window_size=7)
        >>> check_image_size(250, 64, patch_size=16, window_size=7)
        Traceback (most recent call last):
        ...
        ValueError: Images of 250 x 64 pixels do not work with patches of 16 x 16 pixels and windows of 7 x 7 patches: \
height and width must be multiples of 16 and at least 112; the nearest size that works is 256 x 112.
    """
    smallest = patch_size * window_size
    if all(side % patch_size == 0 and side >= smallest for side in (height, width)):
        return
    near_height, near_width = (max(smallest, round(side / patch_size) * patch_size) for side in (height, width))
    msg = (
        f"Images of {height} x {width} pixels do not work with patches of {patch_size} x {patch_size} pixels and "
        f"windows of {window_size} x {window_size} patches: height and width must be multiples of {patch_size} and at "
        f"least {smallest}; the nearest size that works is {near_height} x {near_width}."
    )
    raise ValueError(msg)
