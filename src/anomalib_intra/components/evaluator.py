# SPDX-License-Identifier: Apache-2.0
"""anomalib's evaluator for scores in float64, and for a validation while training that cannot score all."""

from collections.abc import Mapping
from typing import Any

from anomalib.data import ImageBatch
from anomalib.metrics import AUPR, AUPRO, AUROC, Evaluator, F1AdaptiveThreshold, F1Max
from torch.nn import ModuleList

from anomalib_intra.components.batch import UnroundedBatch
from anomalib_intra.training.internals import expect_raw_scores

#: Metrics that compare scores with each other, which rounding would tie; all of them take float64.
_RANKING = (AUROC, AUPR, AUPRO, F1Max, F1AdaptiveThreshold)

#: What is only there where images are scored, and where thresholds are known.
_SCORES = {"pred_score", "anomaly_map"}
_DECISIONS = {"pred_label", "pred_mask"}


class SelectiveEvaluator(Evaluator):
    """Gives each metric what it can take, and computes none that the present validation cannot give.

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

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Update the metrics of the validation."""
        del trainer, pl_module, outputs, batch_idx, dataloader_idx
        _update(self._possible(), batch)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Compute and log them."""
        every = self.val_metrics
        self.val_metrics = ModuleList(self._possible())
        super().on_validation_epoch_end(trainer, pl_module)
        self.val_metrics = every

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Update the metrics of the test."""
        del trainer, pl_module, outputs, batch_idx, dataloader_idx
        _update(self.test_metrics, batch)

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


def _update(metrics: Any, batch: ImageBatch) -> None:
    rounded = batch.rounded() if isinstance(batch, UnroundedBatch) else batch
    for metric in metrics:
        metric.update(batch if isinstance(metric, _RANKING) else rounded)


def _fields(metric: Any) -> list[str]:
    return list(getattr(metric, "fields", []))
