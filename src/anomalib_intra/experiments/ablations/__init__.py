# SPDX-License-Identifier: Apache-2.0
"""The paper's ablation studies (sec. 4.3) on the runs of the benchmark."""

from anomalib_intra.experiments.ablations.command import StudyRuns, ablations

__all__ = ["StudyRuns", "ablations"]
