# SPDX-License-Identifier: Apache-2.0
"""The report of a run: one HTML page with its figures, curves, score histogram and telling cases."""

from anomalib_intra.report.callback import RunReport

__all__ = ["RunReport"]
