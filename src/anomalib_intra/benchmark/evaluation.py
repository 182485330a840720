# SPDX-License-Identifier: Apache-2.0
"""The same metrics for every model, computed on raw scores."""

from typing import Any

import torch
from anomalib import metrics
from anomalib.data import ImageBatch
from anomalib.metrics import AUPRO, Evaluator, F1Max

from anomalib_intra.training.internals import expect_raw_scores

#: What is measured of every model; the best F1 is that over all thresholds, so no model's way to set one matters.
METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO", "image_F1Max", "pixel_F1Max")


class AUROC(metrics.AUROC):
    """anomalib's AUROC, which refuses scores that are not finite."""

    def update(self, batch: ImageBatch) -> None:
        """Take a batch into account.

        Args:
            batch (ImageBatch): The batch.

        Raises:
            ValueError: If scores are not finite.
        """
        scores = getattr(batch, self.fields[0], None)
        if scores is not None and not torch.isfinite(scores).all():
            msg = f"The model gave scores that are not finite, so {self.name} cannot be computed."
            raise ValueError(msg)
        super().update(batch)


def evaluator() -> Evaluator:
    """Make the evaluator of a run.

    Returns:
        Evaluator: Computes :data:`METRICS` on the test images.
    """
    image: dict[str, Any] = {"fields": ["pred_score", "gt_label"], "prefix": "image_", "strict": False}
    pixel: dict[str, Any] = {"fields": ["anomaly_map", "gt_mask"], "prefix": "pixel_", "strict": False}
    test_metrics: list[Any] = [AUROC(**image), AUROC(**pixel), AUPRO(**pixel), F1Max(**image), F1Max(**pixel)]
    for metric in test_metrics:
        expect_raw_scores(metric)
    return Evaluator(test_metrics=test_metrics)
