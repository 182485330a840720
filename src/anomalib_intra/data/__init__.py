# SPDX-License-Identifier: Apache-2.0
"""Datamodules: MVTec AD with the paper's validation protocol, and a small generated data set."""

from anomalib_intra.data.demo import TextureDemo
from anomalib_intra.data.mvtec import MVTec

__all__ = ["MVTec", "TextureDemo"]
