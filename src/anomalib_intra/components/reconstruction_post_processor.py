# SPDX-License-Identifier: Apache-2.0
"""From image and reconstruction to anomaly map, score and decision (sec. 3.5, eq. 16-18)."""

from typing import Any, get_args

import torch
from anomalib.data import InferenceBatch
from anomalib.models.components import DynamicBufferMixin
from lightning.pytorch import LightningModule, Trainer

from anomalib_intra.components.anomaly_map import Deviation, anomaly_map, image_score
from anomalib_intra.components.arguments import asked, check_shares
from anomalib_intra.components.batch import InTraBatch
from anomalib_intra.components.checkpoint_fit import HOW_TO_CALIBRATE
from anomalib_intra.components.reconstruction import Comparison
from anomalib_intra.components.thresholds import UnsaturatedPostProcessor
from anomalib_intra.data.file_view import FileView, file_view
from anomalib_intra.data.image_files import common_size, masks_of_files
from anomalib_intra.data.pipeline import parts_of, transform_of

_DEVIATIONS = get_args(Deviation)
#: The options on which difference maps, anomaly maps and scores depend, and what they are in the paper.
PAPERS_MAP: dict[str, Any] = {"colour_weight": 0.0, "deviation": "squared", "score_share": 0.0}


class InTraPostProcessor(DynamicBufferMixin, UnsaturatedPostProcessor):
    """Anomaly maps by multiscale gradient magnitude similarity, scores and thresholds.

    The anomaly map is the squared deviation of the difference map from its mean over the training images (eq. 17), so
    raw maps and scores lie in [0, 1], but for some values of ``deviation``. The training mean is computed once, when
    training ends, and stored with the thresholds in the checkpoint.

    Normalization and thresholds are those of :class:`UnsaturatedPostProcessor`. Here, too, a setting that is None is as
    in the checkpoint that is loaded, and has its default without one.

    Args:
        enable_normalization (bool | None): Normalize scores and maps, the default; False gives the raw ones of eq. 17
            and 18.
        enable_thresholding (bool | None): Predict labels and masks, the default.
        image_sensitivity (float | None): Sensitivity of image decisions in (0, 1); at the default of 0.5 the threshold
            itself decides, higher values call more images anomalous.
        pixel_sensitivity (float | None): The same for pixels.
        image_quantile (float | None): Share of held-out normal images at or below the image threshold. Defaults to
            0.99.
        pixel_quantile (float | None): Share of their pixels at or below the pixel threshold, at least. Defaults to
            0.999.
        original_size (bool | None): Resize anomaly maps to the size of the image files before taking the maximum, and
            compare them with the masks at that size, as the paper does; False, the default, works at the model's size.
            Where images are cropped or padded, maps lie where they belong and are zero where the model sees nothing.
        colour_weight (float | None): Weight in [0, 1] of a colour term in the difference map, beside the gradient term
            of eq. 16, which does not see a colour that changes evenly. 0, the default, is the paper's map.
        deviation (str | None): ``"squared"`` deviation from the training mean (eq. 17), the default; ``"positive"``
            counts only what differs more than in the training images; ``"scaled"`` divides it by the standard deviation
            over the training images, drawn half way towards its mean over all pixels; ``"half"`` is for models whose
            difference maps are logits; ``"raw"`` takes no mean off, for models that have none.
        score_share (float | None): Share of the pixels in [0, 1] whose mean is the score of an image, those with the
            highest values. 0, the default, is their maximum (eq. 18), which a speck of dust can set.

    Raises:
        ValueError: If a setting has no such value.

    ``colour_weight``, ``deviation`` and ``score_share`` are not in the paper; what they gain and lose is in
    docs/lab/small-intra.md and docs/lab/settings.md. They may be asked for when a checkpoint is loaded that was trained
    without; a test then calibrates the model anew.

    Example:
        >>> post_processor = InTraPostProcessor()
        >>> post_processor.set_training_mean(torch.zeros(1, 1, 64, 64))
        >>> images = torch.rand(2, 3, 64, 64)
        >>> post_processor(Comparison(images, images, torch.zeros(2, 1, 64, 64))).pred_score
        tensor([0., 0.])
    """

    training_mean: torch.Tensor
    training_std: torch.Tensor
    suspicion_threshold: torch.Tensor
    raw_display_scale: float | None = 50.0  # as in the paper's Figure 4

    def __init__(
        self,
        enable_normalization: bool | None = None,
        enable_thresholding: bool | None = None,
        image_sensitivity: float | None = None,
        pixel_sensitivity: float | None = None,
        image_quantile: float | None = None,
        pixel_quantile: float | None = None,
        original_size: bool | None = None,
        colour_weight: float | None = None,
        deviation: Deviation | None = None,
        score_share: float | None = None,
    ) -> None:
        given = asked(
            original_size=original_size, colour_weight=colour_weight, deviation=deviation, score_share=score_share
        )
        chosen: dict[str, Any] = {"original_size": False, **PAPERS_MAP, **given}
        check_shares(closed=True, colour_weight=chosen["colour_weight"], score_share=chosen["score_share"])
        if chosen["deviation"] not in _DEVIATIONS:
            raise ValueError(f"deviation must be one of {', '.join(map(repr, _DEVIATIONS))}, got {deviation!r}.")
        super().__init__(
            enable_normalization=enable_normalization,
            enable_thresholding=enable_thresholding,
            image_sensitivity=image_sensitivity,
            pixel_sensitivity=pixel_sensitivity,
            image_quantile=image_quantile,
            pixel_quantile=pixel_quantile,
        )
        self.asked_settings |= given
        self.original_size: bool = chosen["original_size"]
        self.colour_weight: float = chosen["colour_weight"]
        self.deviation: Deviation = chosen["deviation"]
        self.score_share: float = chosen["score_share"]
        # What files go through before the model sees them, and which part of them is left, by their size.
        self._gone_through: list[Any] = []
        self._views: dict[tuple[int, int], FileView] = {}
        self.register_buffer("training_mean", torch.empty(0))
        self.register_buffer("training_std", torch.empty(0))
        self.register_buffer("suspicion_threshold", torch.tensor(torch.nan))

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "original_size", *PAPERS_MAP)

    @property
    def calibrated_with(self) -> dict[str, Any]:
        """The settings on which training mean and thresholds depend."""
        return {**{name: getattr(self, name) for name in PAPERS_MAP}, **super().calibrated_with}

    def expect_other_differences(self, error: str, **settings: Any) -> None:
        """Set what the difference maps of a model call for, whatever a checkpoint says, where they are not InTra's.

        Args:
            error (str): What to say if another value was asked for.
            **settings: The settings.

        Raises:
            ValueError: If another value was asked for.
        """
        for name, value in settings.items():
            if self.asked_settings.setdefault(name, value) != value:
                raise ValueError(error)
            setattr(self, name, value)
        self.raw_display_scale = None  # that of the paper is for squares of small differences

    # ---- from reconstruction to raw map ------------------------------------------------------------------------------

    def raw_anomaly_map(self, differences: torch.Tensor) -> torch.Tensor:
        """Squared deviation of the difference map from the training mean (eq. 17), or another ``deviation``.

        Args:
            differences (torch.Tensor): Difference maps, shape ``(B, 1, H, W)``.

        Returns:
            torch.Tensor: Raw anomaly maps, shape ``(B, 1, H, W)``; not negative, and at most 1 but for ``"scaled"`` and
                ``"half"``.

        Raises:
            RuntimeError: If the model was never calibrated.
            ValueError: If it was calibrated on images of another size.
        """
        if not self.is_calibrated:
            msg = (
                "This model is not calibrated, so it cannot score images: its training was cut off, it was never "
                f"trained, or it was calibrated with other settings. {HOW_TO_CALIBRATE}"
            )
            raise RuntimeError(msg)
        size, trained = (tuple(x.shape[-2:]) for x in (differences, self.training_mean))
        if size != trained:
            msg = (
                f"Images of {size[0]} x {size[1]} pixels reached a model that was calibrated on images of "
                f"{trained[0]} x {trained[1]}: resize the images to that."
            )
            raise ValueError(msg)
        return anomaly_map(differences, self.training_mean, self.training_std, self.deviation)

    def suspicious(self, differences: torch.Tensor) -> torch.Tensor:
        """Tell where a first reconstruction differs so much that a second pass should not see what is there.

        Args:
            differences (torch.Tensor): Difference maps, shape ``(B, 1, H, W)``.

        Returns:
            torch.Tensor: Booleans of shape ``(B, 1, H, W)``, all False before :meth:`suspect_above_pixel_threshold`.
        """
        return self.raw_anomaly_map(differences) > self.suspicion_threshold

    # ---- calibration -------------------------------------------------------------------------------------------------

    @property
    def is_calibrated(self) -> bool:
        """Whether the training mean is there."""
        return self.training_mean.numel() > 0

    def set_training_mean(self, mean: torch.Tensor, std: torch.Tensor | None = None) -> None:
        """Store the mean difference map of the training images (eq. 17).

        Args:
            mean (torch.Tensor): Mean of the difference maps of the training images, shape ``(1, 1, H, W)``.
            std (torch.Tensor | None): Its standard deviation, for ``deviation="scaled"``. Defaults to the same
                everywhere.
        """
        self.training_mean = mean.detach().clone().to(self.suspicion_threshold)
        std = torch.ones_like(mean) if std is None else std
        self.training_std = std.detach().clone().to(self.suspicion_threshold)

    def reset(self) -> None:
        """Forget training mean and thresholds: they belong to weights that are about to change."""
        self.training_mean = torch.empty(0, device=self.suspicion_threshold.device)
        self.training_std = torch.empty(0, device=self.suspicion_threshold.device)
        self.suspicion_threshold.fill_(torch.nan)
        super().reset()

    @property
    def smallest_pixel_threshold(self) -> float:
        """Where maps are of logits, that of a pixel which is as likely defective as not; otherwise 0.

        Some models know the normal pixels so well that all but a thousandth lie far below any defect. Around one, a
        threshold at that quantile would call much anomalous that the model itself thinks is not.
        """
        if self.deviation != "half":
            return 0.0
        return float(anomaly_map(torch.zeros(()), self.training_mean.mean(), self.training_std, self.deviation))

    def suspect_above_pixel_threshold(self) -> None:
        """Have :meth:`suspicious` take the present pixel threshold, which belongs to the first of two passes."""
        self.suspicion_threshold.copy_(self.pixel_threshold)

    def score(self, batch: InTraBatch) -> None:
        """Give a batch raw scores and maps.

        Args:
            batch (InTraBatch): Batch with ``difference``.
        """
        maps = self.raw_anomaly_map(torch.as_tensor(batch.difference))
        batch.update(pred_score=image_score(maps, self.score_share), anomaly_map=maps)

    def observe(self, batch: InTraBatch) -> None:
        """Collect raw scores and maps of images to set thresholds on.

        Args:
            batch (InTraBatch): Batch with ``difference`` and, where known, labels and masks; gets the
                raw scores and maps.
        """
        self.score(batch)
        super().observe(batch)

    # ---- inference ---------------------------------------------------------------------------------------------------

    def forward(self, predictions: Comparison) -> InferenceBatch:
        """Score images by their difference maps.

        Args:
            predictions (Comparison): Images, reconstructions and difference maps.

        Returns:
            InferenceBatch: Scores ``(B,)``, maps ``(B, 1, H, W)`` in float32, labels and masks.
        """
        maps = self.raw_anomaly_map(predictions.difference)
        return super().forward(InferenceBatch(pred_score=image_score(maps, self.score_share), anomaly_map=maps))

    def post_process_batch(self, batch: InTraBatch) -> None:
        """Score a batch in place.

        Args:
            batch (InTraBatch): Batch with ``difference``; gets scores, maps, labels and masks.
        """
        maps, share = self.raw_anomaly_map(torch.as_tensor(batch.difference)), self.score_share
        if self.original_size:
            size = common_size(batch.image_path)
            if size not in self._views:
                self._views[size] = file_view(self._gone_through, size)
            maps = self._views[size].place(maps, size)
            share = min(1.0, share * self._views[size].area(size))  # of what the model sees, as in calibration
        batch.update(pred_score=image_score(maps, share), anomaly_map=maps)
        super().post_process_batch(batch)

    # ---- callback ----------------------------------------------------------------------------------------------------

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Score the batch; with ``original_size``, read its masks again at the size of their files."""
        dataset = _dataset(trainer.test_dataloaders, *args, **kwargs)
        self._remember_the_way(dataset, pl_module)
        super().on_test_batch_end(trainer, pl_module, outputs, *args, **kwargs)
        if self.original_size and outputs.gt_mask is not None:
            masks = masks_of_files(dataset, outputs.image_path, outputs.anomaly_map.shape[-2:])
            outputs.gt_mask = masks.to(outputs.anomaly_map.device)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Score the batch."""
        self._remember_the_way(_dataset(trainer.predict_dataloaders, *args, **kwargs), pl_module)
        super().on_predict_batch_end(trainer, pl_module, outputs, *args, **kwargs)

    def _remember_the_way(self, dataset: Any, module: Any) -> None:
        own = getattr(module.pre_processor, "transform", None)
        way = [*parts_of(transform_of(dataset)), *parts_of(own)]
        if way != self._gone_through:
            self._gone_through, self._views = way, {}

    def on_test_end(self, *_: Any) -> None:
        """Forget transforms that are not the model's, which must not travel with it."""
        self._gone_through, self._views = [], {}

    def on_predict_end(self, *_: Any) -> None:
        """Forget them, too."""
        self._gone_through, self._views = [], {}


def _dataset(loaders: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
    """The data set of a batch, given the arguments of Lightning's hooks."""
    del batch, batch_idx
    return (loaders[dataloader_idx] if isinstance(loaders, list | tuple) else loaders).dataset
