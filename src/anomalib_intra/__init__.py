# SPDX-License-Identifier: Apache-2.0
"""InTra, the Inpainting Transformer for Anomaly Detection (arXiv 2104.13897), and its rivals as anomalib models."""

import warnings

with warnings.catch_warnings():
    # anomalib imports all its models, two of them by names that are going away: nothing a user can mend.
    warnings.simplefilter("ignore", FutureWarning)
    import anomalib.models  # noqa: F401

from anomalib_intra.components.reconstruction_post_processor import InTraPostProcessor
from anomalib_intra.components.thresholds import UnsaturatedPostProcessor
from anomalib_intra.components.visualizer import InTraVisualizer
from anomalib_intra.cutpaste import CutPaste
from anomalib_intra.data import MVTec, TextureDemo
from anomalib_intra.intra.lightning_model import InTra
from anomalib_intra.intra.torch_model import InpaintingTransformer
from anomalib_intra.one_pass import OnePassInTra, OnePassTransformer
from anomalib_intra.patch_svdd import PatchSVDD
from anomalib_intra.riad import RIAD

__all__ = [
    "RIAD",
    "CutPaste",
    "InTra",
    "InTraPostProcessor",
    "InTraVisualizer",
    "InpaintingTransformer",
    "MVTec",
    "OnePassInTra",
    "OnePassTransformer",
    "PatchSVDD",
    "TextureDemo",
    "UnsaturatedPostProcessor",
]
