# SPDX-License-Identifier: Apache-2.0
"""Settings ranked without a test image: by synthetic defects in held-out normal images."""

from anomalib_intra.experiments.synthetic_defects.command import synthetic_defects

__all__ = ["synthetic_defects"]
