# SPDX-License-Identifier: Apache-2.0
"""How well normal images are reconstructed, as an anomalib metric."""

from typing import Any

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AnomalibMetric
from torchmetrics.image import PeakSignalNoiseRatio

from anomalib_intra.components.batch import is_normal
from anomalib_intra.training.internals import forget_update


class PSNR(AnomalibMetric, PeakSignalNoiseRatio):
    """Peak signal-to-noise ratio of the reconstructions of normal images, in dB.

    Eq. 17 subtracts the mean difference map, so even a reconstruction that is a blur can separate normal from anomalous
    images; this says whether the model has learned to paint them.

    Args:
        prefix (str): Prefix of the metric's name.
        **kwargs: As for anomalib's metrics.

    Example:
        >>> from anomalib_intra.components.batch import InTraBatch
        >>> images = torch.full((2, 3, 8, 8), 0.5)
        >>> metric = PSNR()
        >>> metric.update(InTraBatch(image=images, reconstruction=images + 0.1, gt_label=torch.tensor([0, 1])))
        >>> round(float(metric.compute()), 2)
        20.0
    """

    default_fields = ("reconstruction", "image")

    def __init__(self, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(prefix=prefix, strict=False, data_range=1.0, **kwargs)

    def update(self, batch: ImageBatch) -> None:
        """Take the normal images of a batch into account.

        Args:
            batch (ImageBatch): Batch with images, reconstructions and labels.
        """
        normal = is_normal(batch)
        reconstruction = getattr(batch, "reconstruction", None)
        if reconstruction is None or not normal.any():
            forget_update(self)
            return
        super(AnomalibMetric, self).update(reconstruction[normal].float(), torch.as_tensor(batch.image)[normal])
