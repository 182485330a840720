# SPDX-License-Identifier: Apache-2.0
"""What a run can monitor while it trains, and whether it ends, said when it starts and not when it is late."""

import logging
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer

from anomalib_intra.components.evaluator import SelectiveEvaluator

logger = logging.getLogger(__name__)


def validates(trainer: Trainer) -> bool:
    """Tell whether a run has a validation loss.

    Args:
        trainer (Trainer): The trainer.

    Returns:
        bool: False where no images are validated, or nothing is logged.
    """
    return trainer.limit_val_batches != 0 and not trainer.barebones


def has_an_end(trainer: Trainer) -> bool:
    """Tell whether anything ends a training: epochs, steps, a time, or early stopping.

    Args:
        trainer (Trainer): The trainer.

    Returns:
        bool: False where it would go on until it is stopped by hand.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning
    is_counted = trainer.max_epochs not in (None, -1) or trainer.max_steps != -1
    return is_counted or any(isinstance(callback, EarlyStopping | Timer) for callback in callbacks)


def agree_on_metrics(trainer: Trainer, evaluator: Any, scored: bool) -> None:
    """Say which metrics of the validation cannot be had while training, and refuse to wait for one of them.

    Args:
        trainer (Trainer): The trainer.
        evaluator (Any): The model's evaluator, if it has one.
        scored (bool): Whether validation images are scored while training.

    Raises:
        ValueError: If a callback monitors what will never be there.
    """
    missing = [] if validates(trainer) else ["val_loss"]
    if isinstance(evaluator, SelectiveEvaluator):
        lacking = evaluator.what_validation_lacks(scored)
        evaluator.do_without(lacking)
        given = {str(metric.name) for metric in evaluator.val_metrics} - set(lacking)
        missing += [*lacking, *({str(metric.name) for metric in evaluator.test_metrics} - given)]
        if lacking:
            logger.warning(
                "%s of the validation cannot be had while training: %s. val_loss can be monitored.",
                " and ".join(lacking),
                _reason(scored),
            )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning
        monitor = getattr(callback, "monitor", None)
        if monitor in missing and getattr(callback, "strict", True):
            way_out = "validate, or take it out" if monitor == "val_loss" else "monitor val_loss"
            reason = "nothing is validated in this run" if monitor == "val_loss" else _reason(scored)
            msg = f"{type(callback).__name__} monitors {monitor}, which this run does not have ({reason}): {way_out}."
            raise ValueError(msg)


def _reason(scored: bool) -> str:
    if scored:
        return "it is a metric of the test, or needs thresholds, which are set when training ends"
    return (
        "it needs scores of anomalies, and the images that are validated on are all normal; a val_split_mode of "
        "from_test, from_dir or synthetic has some"
    )
