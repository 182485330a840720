# SPDX-License-Identifier: Apache-2.0
"""How fast a model is on this machine, as a share of the best matrix products the machine can do."""

from anomalib_intra.experiments.speed.command import speed

__all__ = ["speed"]
