# SPDX-License-Identifier: Apache-2.0
"""The same metrics for every model, computed on raw scores."""

from typing import Any

import torch
from anomalib.metrics import AUPRO, AnomalibMetric, Evaluator
from anomalib.metrics.auroc import _AUROC
from anomalib.metrics.f1_score import _F1Max

#: What is measured of every model; the best F1 is that over all thresholds, so no model's way to set one matters.
METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO", "image_F1Max", "pixel_F1Max")


def unsaturated(scores: torch.Tensor) -> torch.Tensor:
    """Map raw scores of any range into (0, 1) without moving one above another or tying two that differ.

    torchmetrics takes scores outside [0, 1] for logits and applies a sigmoid, which is 1 in float32 for all scores
    above 17 or so: Mahalanobis distances of defects would all be tied.

    Args:
        scores (torch.Tensor): Float32 scores of magnitude 1e-8 to 1e8, or zero; beyond that, ties are possible.

    Returns:
        torch.Tensor: ``(1 + x / (1 + |x|)) / 2`` in float64.

    Example:
        >>> unsaturated(torch.tensor([-1.0, 0.0, 3.0, 50.0, 51.0])).round(decimals=3)
        tensor([0.2500, 0.5000, 0.8750, 0.9900, 0.9900], dtype=torch.float64)
    """
    scores = scores.double()
    return (1 + scores / (1 + scores.abs())) / 2


class _Unsaturated:
    name: str

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        if not torch.isfinite(preds).all():
            msg = f"The model gave scores that are not finite, so {self.name} cannot be computed."
            raise ValueError(msg)
        if preds.device.type == "mps":  # has no float64
            preds, target = preds.cpu(), target.cpu()
        super().update(unsaturated(preds), target)  # type: ignore[misc]  # of the metric it is mixed into


# Like all metrics of anomalib, these take a batch where those of torchmetrics take tensors.
class AUROC(AnomalibMetric, _Unsaturated, _AUROC):  # type: ignore[misc]
    """anomalib's AUROC for raw scores of any range."""


class F1Max(AnomalibMetric, _Unsaturated, _F1Max):  # type: ignore[misc]
    """anomalib's best F1 score over all thresholds, for raw scores of any range."""


def evaluator() -> Evaluator:
    """Make the evaluator of a run.

    Returns:
        Evaluator: Computes :data:`METRICS` on the test images.
    """
    image: dict[str, Any] = {"fields": ["pred_score", "gt_label"], "prefix": "image_", "strict": False}
    pixel: dict[str, Any] = {"fields": ["anomaly_map", "gt_mask"], "prefix": "pixel_", "strict": False}
    return Evaluator(test_metrics=[AUROC(**image), AUROC(**pixel), AUPRO(**pixel), F1Max(**image), F1Max(**pixel)])
