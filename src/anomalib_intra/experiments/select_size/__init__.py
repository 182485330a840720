# SPDX-License-Identifier: Apache-2.0
"""The choice of the image size by the validation loss (sec. 4.1)."""

from anomalib_intra.experiments.select_size.command import select_size

__all__ = ["select_size"]
