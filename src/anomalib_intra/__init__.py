# SPDX-License-Identifier: Apache-2.0
"""InTra, the Inpainting Transformer for Anomaly Detection (arXiv 2104.13897), and Patch-SVDD as anomalib models."""

from anomalib_intra.data import MVTec, TextureDemo
from anomalib_intra.lightning_model import InTra
from anomalib_intra.patch_svdd import PatchSVDD
from anomalib_intra.post_processor import InTraPostProcessor
from anomalib_intra.thresholds import UnsaturatedPostProcessor
from anomalib_intra.torch_model import InpaintingTransformer
from anomalib_intra.visualizer import InTraVisualizer

__all__ = [
    "InTra",
    "InTraPostProcessor",
    "InTraVisualizer",
    "InpaintingTransformer",
    "MVTec",
    "PatchSVDD",
    "TextureDemo",
    "UnsaturatedPostProcessor",
]
