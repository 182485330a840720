# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint fits the model that loads it."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from anomalib_intra.components.arguments import differing, plain, with_defaults

logger = logging.getLogger(__name__)

#: The way out where a checkpoint cannot score images.
HOW_TO_CALIBRATE = (
    "Leave out settings that are not those of its training. If it was cut off, go on with its training (--ckpt_path) "
    "to the end, which calibrates it and stores that in model.ckpt; if it did end, take that file. Or, in Python, give "
    "the model and the datamodule it was trained on to Engine.test, and go on with that same model: a test stores "
    "nothing."
)

#: The way out where it could, but calls nothing anomalous.
HOW_TO_SET_THRESHOLDS = (
    "Those of a checkpoint are left out if another image_quantile or pixel_quantile is given than it was calibrated "
    "with, and none are set if no good image was held out: leave the quantiles out, or, in Python, give the model and "
    "the datamodule it was trained on to Engine.test, and go on with that same model. enable_thresholding and "
    "enable_normalization of the post-processor, both False, give raw scores."
)


def check_class(
    model: str, arguments: Collection[str], checkpoint: Mapping[str, Any], weights: Collection[str] | None = None
) -> None:
    """Refuse a checkpoint of another class of models: it has arguments that this one does not take, and other weights.

    Args:
        model (str): Name of the model that loads it.
        arguments (Collection[str]): The arguments that the model takes.
        checkpoint (Mapping[str, Any]): The checkpoint.
        weights (Collection[str] | None): Names of its weights; None where it could not be built.

    Raises:
        ValueError: If it is; names these arguments, since checkpoints do not name their class.

    Example:
        >>> padim = {"hyper_parameters": {"backbone": "resnet18"}, "state_dict": {}}
        >>> check_class("InTra", ["depth"], padim, ["model.patch_embedding.weight"])
        Traceback (most recent call last):
        ...
        ValueError: The checkpoint is of another model than InTra, one with the argument backbone: load it with the \
class that was trained, or take a checkpoint of InTra.
    """
    others = _of_another_class(checkpoint.get("hyper_parameters", {}), arguments)
    if others and (weights is None or not set(weights) <= set(checkpoint["state_dict"])):
        msg = (
            f"The checkpoint is of another model than {model}, one with the argument{'s' * (len(others) > 1)} "
            f"{', '.join(others)}: load it with the class that was trained, or take a checkpoint of {model}."
        )
        raise ValueError(msg)


def check_architecture(model: str, names: Sequence[str], saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Refuse weights of another architecture.

    Args:
        model (str): Name of the model.
        names (Sequence[str]): Arguments that decide the shape of the weights, or what they mean.
        saved (Mapping[str, Any]): Arguments of the model that was saved.
        present (Mapping[str, Any]): Arguments of the model that loads it.

    Raises:
        ValueError: If they differ in what decides the weights; names the differences.

    Example:
        >>> check_architecture("InTra", ["depth"], {"depth": 13, "patience": 50}, {"depth": 13, "patience": 5})
        >>> check_architecture("InTra", ["depth"], {"depth": 13}, {"depth": 4})
        Traceback (most recent call last):
        ...
        ValueError: The checkpoint is of another InTra, with depth=13 (here 4): build the model with the checkpoint's \
values, or use InTra.load_from_checkpoint without them.
    """
    others = [
        f"{name}={plain(saved[name])!r} (here {plain(present[name])!r})" for name in differing(names, saved, present)
    ]
    if others:
        msg = (
            f"The checkpoint is of another {model}, with {', '.join(others)}: build the model with the checkpoint's "
            f"values, or use {model}.load_from_checkpoint without them."
        )
        raise ValueError(msg)


def not_given(kind: type, names: Iterable[str], saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Find the arguments of a checkpoint that a model should be built with, since nobody asked for others.

    Args:
        kind (type): Class of the model.
        names (Iterable[str]): Arguments that may be taken.
        saved (Mapping[str, Any]): Arguments of the model that was saved.
        given (Mapping[str, Any]): Arguments of the model that is to be built; those not given have the default.

    Returns:
        dict[str, Any]: Arguments to take from the checkpoint; none if it is of another class.

    Example:
        >>> class Model:
        ...     def __init__(self, depth: int = 4, width: int = 128) -> None: ...
        >>> not_given(Model, ["depth", "width"], {"depth": 6, "width": 64}, {"depth": 4, "width": 192})
        {'depth': 6}
    """
    default = with_defaults(kind, {})
    if _of_another_class(saved, default):
        return {}  # which is refused where it is loaded
    asked = differing(names, default, given)
    return {name: saved[name] for name in differing(names, saved, given) if name not in asked}


def forget_stale_calibration(
    checkpoint: dict[str, Any], stored: Mapping[str, Any], present: Mapping[str, Any], blank: Mapping[str, torch.Tensor]
) -> None:
    """Leave out of a checkpoint what is not calibrated for the way in which images are scored now.

    Args:
        checkpoint (dict[str, Any]): The checkpoint.
        stored (Mapping[str, Any]): How images were scored when it was calibrated.
        present (Mapping[str, Any]): How they are scored now.
        blank (Mapping[str, torch.Tensor]): State of a post-processor that was never calibrated.
    """
    changed = [
        f"{name}={stored[name]!r} (here {value!r})"
        for name, value in present.items()
        if name in stored and stored[name] != value
    ]
    if changed:
        logger.warning(
            "The checkpoint was calibrated with %s: what depends on that is left out, and a test on the data it was "
            "trained on computes it anew.",
            ", ".join(changed),
        )
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **blank}
    else:  # one of an older version lacks what has been added since
        checkpoint["state_dict"] = {**blank, **checkpoint["state_dict"]}


def _of_another_class(saved: Iterable[str], arguments: Collection[str]) -> list[str]:
    """Arguments that the model does not take; Lightning's own begin with an underscore."""
    return [name for name in saved if name not in arguments and not name.startswith("_")]
