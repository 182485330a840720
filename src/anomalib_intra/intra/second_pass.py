# SPDX-License-Identifier: Apache-2.0
"""A second look at an image, in which what was suspicious in the first is covered; not in the paper."""

import torch
from einops import reduce, repeat

from anomalib_intra.components.reconstruction import Reconstruction
from anomalib_intra.intra.torch_model import InpaintingTransformer


def second_pass(model: InpaintingTransformer, first: Reconstruction, suspicious: torch.Tensor) -> Reconstruction:
    """Reconstruct images again, with every patch that holds something suspicious covered by its first reconstruction.

    A patch next to a defect is painted from it in the first pass, and then looks wrong itself or, worse, lets the
    defect look right. In the second pass it is painted from what should be there. Suspicious patches are covered and
    not hidden, since the model was trained with one hidden patch in a window.

    Args:
        model (InpaintingTransformer): The model.
        first (Reconstruction): Images and what the model made of them, ``(B, 3, H, W)`` each.
        suspicious (torch.Tensor): Booleans of shape ``(B, 1, H, W)``.

    Returns:
        Reconstruction: The images, and their second reconstructions. Where an image has nothing suspicious, both
        reconstructions are the same.

    Example:
        >>> model = InpaintingTransformer((64, 64), window_size=3, embed_dim=32, depth=2, num_heads=4)
        >>> first = model(torch.rand(1, 3, 64, 64))
        >>> second = second_pass(model, first, torch.ones(1, 1, 64, 64) > 0)
        >>> torch.equal(second.reconstruction, model.reconstruct(first.reconstruction.clamp(0, 1)))
        True
    """
    size = {"k": model.patch_size, "l": model.patch_size}
    patches = reduce(suspicious.float(), "b 1 (n k) (m l) -> b 1 n m", "max", **size)
    covered = repeat(patches, "b 1 n m -> b 1 (n k) (m l)", **size) > 0
    images = torch.where(covered, first.reconstruction.clamp(0, 1).to(first.image.dtype), first.image)
    if torch.compiler.is_compiling():  # an exported graph cannot choose
        return Reconstruction(first.image, model.reconstruct(images))
    again = covered.flatten(1).any(dim=1)
    second = first.reconstruction.clone()
    if again.any():
        second[again] = model.reconstruct(images[again])
    return Reconstruction(first.image, second)
