# SPDX-License-Identifier: Apache-2.0
"""anomalib's evaluator for scores in float64, validations that cannot score all, and tests of one kind of images."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPR, AUPRO, AUROC, Evaluator, F1AdaptiveThreshold, F1Max, F1Score
from lightning.pytorch.utilities import rank_zero_only

from anomalib_intra.components.batch import UnroundedBatch
from anomalib_intra.training.internals import expect_raw_scores

logger = logging.getLogger(__name__)

#: Metrics that compare scores with each other, which rounding would tie; all of them take float64.
_RANKING = (AUROC, AUPR, AUPRO, F1Max, F1AdaptiveThreshold)

#: What is only there where images are scored, and where thresholds are known.
_SCORES = {"pred_score", "anomaly_map"}
_DECISIONS = {"pred_label", "pred_mask"}


class SelectiveEvaluator(Evaluator):
    """Gives each metric what it can take, and computes none that the present images cannot give.

    A test of normal images alone has no AUROC: torchmetrics says 0, as if the model had failed.

    Metrics that compare scores with each other get scores and maps as they are, raw ones too; all others, some of which
    fail on float64, get them in float32.

    Args:
        evaluator (Evaluator): Its metrics are shared.

    Example:
        >>> evaluator = SelectiveEvaluator(Evaluator(val_metrics=AUROC(fields=["pred_score", "gt_label"])))
        >>> evaluator.what_validation_lacks(scored=False)
        ['AUROC']
    """

    def __init__(self, evaluator: Evaluator) -> None:
        super().__init__(compute_on_cpu=evaluator.compute_on_cpu)
        self.val_metrics, self.test_metrics = evaluator.val_metrics, evaluator.test_metrics
        for metric in (*self.val_metrics, *self.test_metrics):
            expect_raw_scores(metric)
        self._lacking: set[str] = set()
        self._kinds: set[bool] = set()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take nothing from a checkpoint: metrics begin anew in every run, and that run may have had others.

        Args:
            state_dict (Mapping): What the checkpoint has of the metrics.
            strict (bool): Unused.
            assign (bool): Unused.

        Returns:
            Any: No missing and no unexpected keys, as ``Module.load_state_dict`` says it.
        """
        del state_dict
        return super().load_state_dict(self.state_dict(), strict, assign)

    @property
    def wants_scores(self) -> bool:
        """Whether some metric of the validation needs scores."""
        return any(_SCORES & set(_fields(metric)) for metric in self.val_metrics)

    def what_validation_lacks(self, scored: bool) -> list[str]:
        """Name the metrics that a validation while training cannot give.

        Args:
            scored (bool): Whether it scores images.

        Returns:
            list[str]: Names as in the log.
        """
        lacking = _DECISIONS if scored else _DECISIONS | _SCORES
        return [str(metric.name) for metric in self.val_metrics if lacking & set(_fields(metric))]

    def do_without(self, names: list[str]) -> None:
        """Leave out metrics of the validation from now on.

        Args:
            names (list[str]): Their names; none puts an end to it.
        """
        self._lacking = set(names)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin anew, also after a validation that was broken off."""
        del trainer, pl_module
        _reset(self.val_metrics)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Update the metrics of the validation."""
        del trainer, pl_module, outputs, batch_idx, dataloader_idx
        _update(self._possible(), batch)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Compute and log them."""
        _log(trainer, pl_module, self._possible())

    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin anew, also after a test that was broken off."""
        del trainer, pl_module
        self._kinds = set()
        _reset(self.test_metrics)

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Update the metrics of the test."""
        del trainer, pl_module, outputs, batch_idx, dataloader_idx
        if batch.gt_label is not None:
            self._kinds.update(torch.as_tensor(batch.gt_label).bool().flatten().tolist())
        _update(self.test_metrics, batch)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Compute and log them, but for those that compare normal with anomalous images where one kind is missing."""
        normal, anomalous = (
            trainer.strategy.reduce_boolean_decision(kind in self._kinds, all=False) for kind in (False, True)
        )
        every: list[Any] = list(self.test_metrics)
        left_out = [metric for metric in every if normal != anomalous and _compares(metric, anomalous)]
        if left_out:
            rank_zero_only(logger.warning)(
                "The test has no %s images, so %s cannot be computed: there is nothing to compare the others with.",
                "anomalous" if normal else "normal",
                ", ".join(str(metric.name) for metric in left_out),
            )
        _reset(left_out)  # it is as if they had seen no image
        _log(trainer, pl_module, every)

    def _possible(self) -> list[Any]:
        return [metric for metric in self.val_metrics if metric.name not in self._lacking]


def selective(evaluator: Evaluator) -> Evaluator:
    """Make an evaluator selective, unless it measures in a way of its own.

    Args:
        evaluator (Evaluator): Any evaluator.

    Returns:
        Evaluator: One with the same metrics; the given one if it does something else with batches.
    """
    hooks = [f"on_{stage}_{part}_end" for stage in ("validation", "test") for part in ("batch", "epoch")]
    as_anomalib = all(getattr(type(evaluator), hook) is getattr(Evaluator, hook) for hook in hooks)
    return SelectiveEvaluator(evaluator) if as_anomalib else evaluator


def _reset(metrics: Any) -> None:
    for metric in metrics:
        metric.reset()


def _update(metrics: Any, batch: ImageBatch) -> None:
    rounded = batch.rounded() if isinstance(batch, UnroundedBatch) else batch
    for metric in metrics:
        metric.update(batch if isinstance(metric, _RANKING) else rounded)


def _log(trainer: Any, pl_module: Any, metrics: list[Any]) -> None:
    # As anomalib's evaluator does it. Lightning knows a metric by its place among the others, so none is taken out.
    for metric in metrics:
        # One that no image had the fields of, in any process; torchmetrics would warn of it.
        if not trainer.strategy.reduce_boolean_decision(getattr(metric, "update_called", True), all=False):
            continue
        pl_module.log(metric.name, metric)
        if trainer.barebones:
            trainer.callback_metrics[metric.name] = trainer.logged_metrics[metric.name] = metric.compute()


def _compares(metric: Any, anomalous: bool) -> bool:
    """Whether a metric compares normal with anomalous images, or pixels where all are of one kind."""
    # An anomalous image has normal pixels, too.
    truth = {"gt_label"} if anomalous else {"gt_label", "gt_mask"}
    return isinstance(metric, (*_RANKING, F1Score)) and bool(truth & set(_fields(metric)))


def _fields(metric: Any) -> list[str]:
    return list(getattr(metric, "fields", []))
