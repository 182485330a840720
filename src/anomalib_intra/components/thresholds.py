# SPDX-License-Identifier: Apache-2.0
"""From raw scores and maps to decisions, without saturation: thresholds and normalized scores of any model."""

import logging
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from anomalib_intra.components.arguments import asked, check_shares
from anomalib_intra.components.batch import is_normal
from anomalib_intra.training.internals import expect_raw_scores
from anomalib_intra.training.processes import gathered

logger = logging.getLogger(__name__)

#: Normal images from which a threshold is hardly more than a guess.
_FEW = 20

# Normalization takes smaller thresholds as this one (decisions do not): zero, of constant images, would divide by zero,
# and far below it float64 no longer tells scores near 1 apart.
_SMALLEST_THRESHOLD = 1e-7


class _Observed:
    """Raw values (of images, or of their pixels), with the truth about them where it is known, on the CPU."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._values: list[torch.Tensor] = []
        self._truth: list[torch.Tensor] = []
        self._normal: list[torch.Tensor] = []

    def add(self, values: torch.Tensor, truth: torch.Tensor | None, is_normal: torch.Tensor) -> None:
        """Add the values of a batch; ``is_normal`` tells which images are."""
        self._normal.append(values[is_normal].flatten().cpu())
        if truth is not None:
            self._values.append(values.flatten().cpu())
            self._truth.append(truth.flatten().int().cpu())

    def all(self) -> Iterator[torch.Tensor]:
        """Give the values whose truth is known, that truth, and the values of normal images."""
        for parts, kind in ((self._values, torch.float32), (self._truth, torch.int32), (self._normal, torch.float32)):
            yield torch.cat([torch.empty(0, dtype=kind), *parts])


class UnsaturatedPostProcessor(PostProcessor):
    """Thresholds and normalization for raw scores and maps that are not negative.

    Normalization maps a raw score x to ``x / (x + threshold)``: 0.5 at the threshold, always below 1, and strictly
    increasing. It is computed in float64 (float32 on devices without it), so that scores are tied after it only if
    they were before. Thresholds below 1e-7 are normalized as 1e-7; decisions always use the threshold itself. Called
    directly or exported, scores are rounded to float32.

    Thresholds are those of the best F1 score where the validation images hold labelled anomalies and normal images, and
    otherwise quantiles of the held-out normal images.

    A setting that is None is as in the checkpoint that is loaded, and has its default without one; one that is given
    outlives a checkpoint made with another.

    Args:
        enable_normalization (bool | None): Normalize scores and maps, the default; False gives the raw ones.
        enable_thresholding (bool | None): Predict labels and masks, the default.
        image_sensitivity (float | None): Sensitivity of image decisions in (0, 1); at the default of 0.5 the threshold
            itself decides, higher values call more images anomalous.
        pixel_sensitivity (float | None): The same for pixels.
        image_quantile (float | None): Share of held-out normal images at or below the image threshold. Defaults to
            0.99. It is interpolated: of fewer than a hundred images, the highest lies above it.
        pixel_quantile (float | None): Share of their pixels at or below the pixel threshold, at least. Defaults to
            0.999.

    Raises:
        ValueError: If a sensitivity or a quantile is no share.

    Example:
        >>> post_processor = UnsaturatedPostProcessor(enable_normalization=False)
        >>> raw = InferenceBatch(pred_score=torch.tensor([0.25]), anomaly_map=torch.ones(1, 1, 2, 2))
        >>> post_processor(raw).pred_score
        tensor([0.2500])
    """

    def __init__(
        self,
        enable_normalization: bool | None = None,
        enable_thresholding: bool | None = None,
        image_sensitivity: float | None = None,
        pixel_sensitivity: float | None = None,
        image_quantile: float | None = None,
        pixel_quantile: float | None = None,
    ) -> None:
        sensitivities = asked(image_sensitivity=image_sensitivity, pixel_sensitivity=pixel_sensitivity)
        quantiles = asked(image_quantile=image_quantile, pixel_quantile=pixel_quantile)
        check_shares(closed=False, **sensitivities)
        check_shares(closed=True, **quantiles)
        switches = asked(enable_normalization=enable_normalization, enable_thresholding=enable_thresholding)
        super().__init__(**switches, **sensitivities)
        for metric in (self._image_threshold_metric, self._pixel_threshold_metric):
            expect_raw_scores(metric)
        self.image_quantile: float = quantiles.get("image_quantile", 0.99)
        self.pixel_quantile: float = quantiles.get("pixel_quantile", 0.999)
        #: The settings that were given, which outlive a checkpoint made with others.
        self.asked_settings: dict[str, Any] = {**switches, **sensitivities, **quantiles}
        self.forget_observed()

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "image_quantile", "pixel_quantile")

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore settings but for those that were given.

        Args:
            config (dict[str, Any]): Settings from a checkpoint.
        """
        super().load_checkpoint_config({**config, **self.asked_settings})

    @property
    def calibrated_with(self) -> dict[str, Any]:
        """The settings on which the calibration depends."""
        return {"image_quantile": self.image_quantile, "pixel_quantile": self.pixel_quantile}

    @property
    def asked_calibration(self) -> dict[str, Any]:
        """Those of them that were given."""
        return {name: value for name, value in self.calibrated_with.items() if name in self.asked_settings}

    # ---- calibration -------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the thresholds: they belong to weights that are about to change."""
        self._image_threshold.fill_(torch.nan)
        self._pixel_threshold.fill_(torch.nan)
        self.forget_observed()

    @property
    def lacks_thresholds(self) -> bool:
        """Whether it is to decide or to normalize by thresholds that were never set."""
        return (self.enable_thresholding or self.enable_normalization) and bool(self._image_threshold.isnan())

    def observe(self, batch: ImageBatch) -> None:
        """Collect raw scores and maps of images to set thresholds on.

        Args:
            batch (ImageBatch): Batch with raw scores and maps and, where known, labels and masks.
        """
        assert batch.pred_score is not None
        assert batch.anomaly_map is not None
        normal = is_normal(batch)
        self._anomalies_seen |= not bool(normal.all())
        self._images.add(batch.pred_score, batch.gt_label, normal)
        self._pixels.add(batch.anomaly_map, batch.gt_mask, normal)

    @property
    def smallest_pixel_threshold(self) -> float:
        """What the threshold of pixels is at least, however low the maps of normal images are."""
        return 0.0

    def set_thresholds(self) -> None:
        """Set the thresholds from all images observed since the last call, and forget these."""
        some_anomalous = bool(gathered(self._image_threshold.new_tensor([float(self._anomalies_seen)])).any())
        images = (self._image_threshold, self._image_threshold_metric, self._images, self.image_quantile, 0.0)
        pixels = (
            self._pixel_threshold,
            self._pixel_threshold_metric,
            self._pixels,
            self.pixel_quantile,
            self.smallest_pixel_threshold,
        )
        for threshold, metric, observed, quantile, smallest in (images, pixels):
            values, truth, normal = (gathered(part.to(threshold.device)) for part in observed.all())
            if some_anomalous and not len(normal):
                logger.warning(
                    "All validation images are anomalous, so the %s threshold stays as it was: that of the best F1 "
                    "would call everything anomalous.",
                    observed.kind,
                )
            elif some_anomalous and len(values):
                batch: Any = SimpleNamespace(**dict(zip(metric.fields, (values, truth), strict=True)))
                metric.update(batch)
                threshold.copy_(metric.compute())
                metric.reset()
            elif len(normal):
                if observed is self._images and len(normal) < _FEW:
                    rank_zero_only(logger.warning)(
                        "The image threshold is set by only %d normal image%s: about one good part in %d, or more, "
                        "will be called anomalous. Hold out more good images to set it better.",
                        len(normal),
                        "s" * (len(normal) > 1),
                        len(normal) + 1,
                    )
                # NumPy, since torch.quantile takes no more than 16 million values.
                threshold.fill_(max(smallest, float(np.quantile(normal.cpu().numpy(), quantile))))
        self.forget_observed()

    def forget_observed(self) -> None:
        """Forget the images observed so far, such as those of a validation that was broken off."""
        self._anomalies_seen = False
        self._images = _Observed("image")
        self._pixels = _Observed("pixel")

    # ---- inference ---------------------------------------------------------------------------------------------------

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Turn raw scores and maps into normalized ones and decisions.

        Args:
            predictions (InferenceBatch): Raw scores ``(B,)`` and maps ``(B, 1, H, W)``.

        Returns:
            InferenceBatch: Scores, maps in float32, labels and masks.
        """
        scores, maps, labels, masks = self._decide(predictions.pred_score, predictions.anomaly_map)
        return InferenceBatch(pred_score=scores.float(), pred_label=labels, anomaly_map=maps.float(), pred_mask=masks)

    def post_process_batch(self, batch: ImageBatch) -> None:
        """Do the same with a batch, in place.

        Args:
            batch (ImageBatch): Batch with raw scores and maps; gets normalized ones, labels and masks.
        """
        scores, maps, labels, masks = self._decide(batch.pred_score, batch.anomaly_map)
        batch.update(pred_score=scores, anomaly_map=maps, pred_label=labels, pred_mask=masks)

    def _decide(
        self, scores: torch.Tensor | None, maps: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        assert scores is not None
        assert maps is not None
        labels = masks = None
        if self.enable_thresholding:
            labels = self._exceeds(scores, self.image_threshold, self.image_sensitivity)
            masks = self._exceeds(maps, self.pixel_threshold, self.pixel_sensitivity)
        if self.enable_normalization:
            scores = self._normalize(scores, self.image_threshold)
            maps = self._normalize(maps, self.pixel_threshold)
        return scores, maps, labels, masks

    @staticmethod
    def _exceeds(raw: torch.Tensor, threshold: torch.Tensor, sensitivity: float) -> torch.Tensor:
        # x / (x + threshold) > 1 - sensitivity, solved for x: decisions do not depend on normalization.
        return raw * sensitivity > threshold * (1 - sensitivity)

    @staticmethod
    def _normalize(raw: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        # An exported model rounds to float32 anyway, and OpenVINO, which has no float64, would take a rounding for
        # nothing and mix up the names of the outputs.
        if raw.device.type != "mps" and not torch.compiler.is_compiling():
            raw, threshold = raw.double(), threshold.double()
        threshold = threshold.clamp(min=_SMALLEST_THRESHOLD)
        return torch.where(torch.isnan(threshold), raw, raw / (raw + threshold))

    # ---- what pictures and reports need ------------------------------------------------------------------------------

    #: What raw maps are multiplied by to be shown; None puts the threshold at half of the scale.
    raw_display_scale: float | None = None

    @property
    def display_scale(self) -> float:
        """What the maps that come out are multiplied by to be shown from 0 to 1: one value for a whole run."""
        threshold = float(self.pixel_threshold)
        if self.enable_normalization and not math.isnan(threshold):
            return 1.0  # normalized, which puts the threshold at 0.5
        return self.raw_display_scale or (0.5 / threshold if threshold > 0 else 1.0)

    @property
    def decision_threshold(self) -> float | None:
        """The score above which an image is called anomalous, on the scale of the scores that come out.

        None where nothing is decided: thresholding is off, or no threshold was ever set.
        """
        threshold = float(self.image_threshold)
        if not self.enable_thresholding or math.isnan(threshold):
            return None
        allowed = 1 - self.image_sensitivity
        return allowed if self.enable_normalization else threshold * allowed / self.image_sensitivity

    # ---- callback ----------------------------------------------------------------------------------------------------

    def score(self, batch: Any) -> None:
        """Give a batch raw scores and maps, where the model has not done so.

        Args:
            batch (Any): Batch of images.
        """

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        del trainer, pl_module
        self.forget_observed()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Score a batch, if the model can, and collect the scores for thresholds, unless the model is being trained."""
        del args, kwargs
        if trainer.state.fn != TrainerFn.FITTING:
            self.observe(outputs)
        elif pl_module.is_calibrated:  # for the time being
            self.score(outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the thresholds anew, unless the model is being trained."""
        del pl_module
        if trainer.state.fn != TrainerFn.FITTING:
            self.set_thresholds()
