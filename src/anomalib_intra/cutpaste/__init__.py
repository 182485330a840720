# SPDX-License-Identifier: Apache-2.0
"""CutPaste (Li et al., CVPR 2021) as an anomalib model."""

from anomalib_intra.cutpaste.lightning_model import CutPaste

__all__ = ["CutPaste"]
