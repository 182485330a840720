# SPDX-License-Identifier: Apache-2.0
"""A transformer that inpaints all patches of an image in one pass."""

from anomalib_intra.one_pass.lightning_model import OnePassInTra
from anomalib_intra.one_pass.torch_model import OnePassTransformer

__all__ = ["OnePassInTra", "OnePassTransformer"]
