# SPDX-License-Identifier: Apache-2.0
"""One category end to end with the paper's settings, and what came out beside the paper's figures."""

from anomalib_intra.experiments.reproduce.command import reproduce

__all__ = ["reproduce"]
