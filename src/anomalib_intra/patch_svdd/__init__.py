# SPDX-License-Identifier: Apache-2.0
"""Patch-SVDD (Yi & Yoon, ACCV 2020) as an anomalib model."""

from anomalib_intra.patch_svdd.lightning_model import PatchSVDD

__all__ = ["PatchSVDD"]
