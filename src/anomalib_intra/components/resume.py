# SPDX-License-Identifier: Apache-2.0
"""What a training that goes on takes over from its checkpoint, and what it has otherwise from now on."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping

from anomalib_intra.components.arguments import differing

logger = logging.getLogger(__name__)

#: Values that a line of the log can show.
_PLAIN = bool | int | float | str | None


def tell_what_changed(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Tell which arguments a training that goes on has now, where they are not those that it began with.

    Those that hold a component, not a plain value, are passed over.

    Args:
        saved (Mapping[str, Any]): Arguments of the model that was saved.
        present (Mapping[str, Any]): Arguments of the model that goes on.
    """
    changed = [
        f"{name}={present[name]!r} (until now {saved[name]!r})"
        for name in differing(present, saved, present)
        if isinstance(present[name], _PLAIN) and isinstance(saved[name], _PLAIN)
    ]
    if changed:
        logger.warning(
            "The training goes on with %s. To go on as it began, give the arguments that it began with.",
            ", ".join(changed),
        )


def set_learning_rate(checkpoint: dict[str, Any], saved: float, present: float) -> None:
    """Let a training go on with another learning rate than is in its checkpoint, where all rates are shares of one.

    Args:
        checkpoint (dict[str, Any]): The checkpoint, whose optimizers and schedules are changed in place.
        saved (float): The learning rate it began with.
        present (float): The learning rate it goes on with.

    Example:
        >>> checkpoint = {"optimizer_states": [{"param_groups": [{"lr": 1e-3}, {"lr": 5e-4}]}]}
        >>> set_learning_rate(checkpoint, 2e-3, 1e-3)
        >>> checkpoint["optimizer_states"][0]["param_groups"]
        [{'lr': 0.0005}, {'lr': 0.00025}]
    """
    factor = present / saved
    for group in (group for state in checkpoint.get("optimizer_states", []) for group in state["param_groups"]):
        group.update({name: factor * group[name] for name in ("lr", "initial_lr") if name in group})
    for schedule in checkpoint.get("lr_schedulers", []):
        names = [name for name in ("base_lrs", "_last_lr") if name in schedule]
        schedule.update({name: [factor * rate for rate in schedule[name]] for name in names})


def seek_best_anew(checkpoint: dict[str, Any]) -> None:
    """Let what compares validation losses forget those of before, where they were of another kind.

    Args:
        checkpoint (dict[str, Any]): The checkpoint, whose callbacks and losses are changed in place.

    Example:
        >>> of_best = "ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min'}"
        >>> checkpoint = {"callbacks": {of_best: {}, "Timer": {}}, "losses": [{"epoch": 0, "val_loss": 0.1}]}
        >>> seek_best_anew(checkpoint)
        >>> checkpoint
        {'callbacks': {'Timer': {}}, 'losses': [{'epoch': 0}]}
    """
    states = checkpoint.get("callbacks", {})
    for name in [name for name in states if "'monitor': 'val_loss'" in name]:
        del states[name]
    losses = checkpoint.get("losses", [])
    checkpoint["losses"] = [{name: value for name, value in row.items() if name != "val_loss"} for row in losses]


def keep_patience(checkpoint: dict[str, Any], callbacks: Iterable[Callback]) -> None:
    """Let early stopping wait as long as it is told now, not as long as when the run began.

    Args:
        checkpoint (dict[str, Any]): The checkpoint, whose callbacks are changed in place.
        callbacks (Iterable[Callback]): Those of the trainer.

    Example:
        >>> checkpoint = {"callbacks": {EarlyStopping("val_loss").state_key: {"wait_count": 3, "patience": 3}}}
        >>> keep_patience(checkpoint, [EarlyStopping("val_loss", patience=50)])
        >>> list(checkpoint["callbacks"].values())
        [{'wait_count': 3, 'patience': 50}]
    """
    states = checkpoint.get("callbacks", {})
    for callback in callbacks:
        if isinstance(callback, EarlyStopping) and callback.state_key in states:
            states[callback.state_key]["patience"] = callback.patience
