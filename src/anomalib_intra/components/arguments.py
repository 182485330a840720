# SPDX-License-Identifier: Apache-2.0
"""Arguments of models and post-processors: what is refused, what was asked for, what was left to the defaults."""

import math
from collections.abc import Iterable, Mapping, Sequence
from inspect import Parameter, signature
from numbers import Integral
from typing import Any


def check_counts(**counts: int) -> None:
    """Refuse sizes and numbers below one.

    Args:
        **counts (int): Arguments by their names.

    Raises:
        ValueError: If one is below 1, or no whole number.

    Example:
        >>> check_counts(depth=13, window_batch_size=0)
        Traceback (most recent call last):
        ...
        ValueError: window_batch_size must be a whole number of at least 1, got 0.
    """
    for name, count in counts.items():
        if isinstance(count, bool) or int(count) != count or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}.")


def height_and_width(image_size: Sequence[int]) -> tuple[int, int]:
    """Refuse what is no size of images.

    Args:
        image_size (Sequence[int]): Height and width in pixels.

    Returns:
        tuple[int, int]: The same.

    Raises:
        ValueError: If it is anything but two whole numbers.

    Example:
        >>> height_and_width([256, 320])
        (256, 320)
        >>> height_and_width(256)
        Traceback (most recent call last):
        ...
        ValueError: image_size must be height and width in pixels, such as (256, 256), got 256.
    """
    if (
        not isinstance(image_size, Sequence)
        or len(image_size) != 2
        or not all(isinstance(side, Integral) for side in image_size)
    ):
        raise ValueError(f"image_size must be height and width in pixels, such as (256, 256), got {image_size!r}.")
    return image_size[0], image_size[1]


def check_shares(closed: bool, **shares: float) -> None:
    """Refuse what is no share of one.

    Args:
        closed (bool): Whether 0 and 1 themselves are shares.
        **shares (float): Arguments by their names.

    Raises:
        ValueError: If one lies outside, or is no number.

    Example:
        >>> check_shares(closed=True, image_quantile=1.0)
        >>> check_shares(closed=False, image_sensitivity=1.0)
        Traceback (most recent call last):
        ...
        ValueError: image_sensitivity must be in (0, 1), got 1.0.
    """
    for name, share in shares.items():
        if not (0 <= share <= 1 if closed else 0 < share < 1):
            raise ValueError(f"{name} must be in {'[0, 1]' if closed else '(0, 1)'}, got {share!r}.")


def check_weights(**weights: float) -> None:
    """Refuse weights and rates that are negative or no numbers.

    Args:
        **weights (float): Arguments by their names.

    Raises:
        ValueError: If one is below 0, infinite or NaN.

    Example:
        >>> check_weights(learning_rate=-1e-4)
        Traceback (most recent call last):
        ...
        ValueError: learning_rate must be a number of at least 0, got -0.0001.
    """
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be a number of at least 0, got {weight!r}.")


def asked(**arguments: Any) -> dict[str, Any]:
    """Tell the arguments that were given: all that are not None.

    Args:
        **arguments (Any): Arguments by their names.

    Returns:
        dict[str, Any]: Those that were given.

    Example:
        >>> asked(colour_weight=0.0, deviation=None)
        {'colour_weight': 0.0}
    """
    return {name: value for name, value in arguments.items() if value is not None}


def with_defaults(kind: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Add what was not given: an older version did not know the argument, and did what is the default now.

    Args:
        kind (type): Class that takes the arguments.
        arguments (Mapping[str, Any]): Those that were given.

    Returns:
        dict[str, Any]: All arguments.

    Example:
        >>> class Model:
        ...     def __init__(self, depth: int, readout: str = "mean") -> None: ...
        >>> with_defaults(Model, {"depth": 13})
        {'readout': 'mean', 'depth': 13}
    """
    parameters = signature(kind).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.default is not Parameter.empty}
    return {**defaults, **arguments}


def differing(names: Iterable[str], saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Find the arguments whose values differ.

    Args:
        names (Iterable[str]): Arguments to look at.
        saved (Mapping[str, Any]): Their values in a checkpoint.
        present (Mapping[str, Any]): Their values here.

    Returns:
        list[str]: Those that are in both and differ.

    Example:
        >>> differing(["size", "depth"], {"size": [64, 64], "depth": 4}, {"size": (64, 64), "depth": 6})
        ['depth']
    """
    known = (name for name in names if name in saved and name in present)
    return [name for name in known if plain(saved[name]) != plain(present[name])]


def plain(value: Any) -> Any:
    """Give a list of a config or a checkpoint as the tuple that it stands for; other values as they are.

    Args:
        value (Any): Value of an argument.

    Returns:
        Any: The value.
    """
    return tuple(value) if isinstance(value, list) else value
