# SPDX-License-Identifier: Apache-2.0
"""RIAD (Zavrtanik, Kristan & Skočaj, Pattern Recognition 2021) as an anomalib model."""

from anomalib_intra.riad.lightning_model import RIAD

__all__ = ["RIAD"]
