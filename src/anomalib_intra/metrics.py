# SPDX-License-Identifier: Apache-2.0
"""What tells how good a model that paints images again is: anomalib's metrics and the PSNR of normal images."""

from typing import Any

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPRO, AUROC, AnomalibMetric, Evaluator, F1Score
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


class PaperEvaluator(Evaluator):
    """Measures a test as the paper does (AUROC of images and of pixels), and beside that AUPRO, F1 and PSNR.

    Results are ``image_AUROC``, ``image_F1Score``, ``pixel_AUROC``, ``pixel_F1Score``, ``pixel_AUPRO`` in 0 .. 1 and
    ``good_PSNR``, that of normal images, in dB. What is said of pixels is left out where there are no masks, and PSNR
    where there are no reconstructions.

    Args:
        decisions (bool): Measure the decisions too, by their F1; False leaves it to the scores, which depend on no
            threshold.
        psnr_prefix (str): Prefix of PSNR's name.

    Raises:
        ValueError: While testing, if images have no label or no score, or (with ``decisions``) are not decided on.

    Example:
        >>> [metric.name for metric in PaperEvaluator().test_metrics]
        ['image_AUROC', 'image_F1Score', 'pixel_AUROC', 'pixel_F1Score', 'pixel_AUPRO', 'good_PSNR']
        >>> [metric.name for metric in PaperEvaluator(decisions=False, psnr_prefix="").test_metrics]
        ['image_AUROC', 'pixel_AUROC', 'pixel_AUPRO', 'PSNR']
    """

    def __init__(self, decisions: bool = True, psnr_prefix: str = "good_") -> None:
        pixels: dict[str, Any] = {"prefix": "pixel_", "strict": False}
        image_f1 = [F1Score(["pred_label", "gt_label"], prefix="image_")] if decisions else []
        pixel_f1 = [F1Score(["pred_mask", "gt_mask"], **pixels)] if decisions else []
        super().__init__(
            test_metrics=[
                AUROC(["pred_score", "gt_label"], prefix="image_"),
                *image_f1,
                AUROC(["anomaly_map", "gt_mask"], **pixels),
                *pixel_f1,
                AUPRO(["anomaly_map", "gt_mask"], **pixels),
                PSNR(psnr_prefix),
            ]
        )
