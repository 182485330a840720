# SPDX-License-Identifier: Apache-2.0
"""Models side by side: every model on every category with every seed, in one table."""

from anomalib_intra.benchmark.command import benchmark

__all__ = ["benchmark"]
