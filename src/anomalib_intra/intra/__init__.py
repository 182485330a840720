# SPDX-License-Identifier: Apache-2.0
"""InTra, the inpainting transformer of the paper (arXiv 2104.13897)."""

from anomalib_intra.intra.lightning_model import InTra
from anomalib_intra.intra.torch_model import InpaintingTransformer

__all__ = ["InTra", "InpaintingTransformer"]
