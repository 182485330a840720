# SPDX-License-Identifier: Apache-2.0
"""The state of the random number generators, as plain data that a checkpoint can hold."""

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Read the states of Python's, NumPy's and torch's generators.

    Returns:
        dict[str, Any]: Tensors, numbers and tuples, which load with ``weights_only=True``.

    Example:
        >>> state = random_state()
        >>> first = torch.rand(3), random.random(), np.random.rand()
        >>> set_random_state(state)
        >>> torch.equal(first[0], torch.rand(3)), first[1] == random.random(), first[2] == np.random.rand()
        (True, True, True)
    """
    numpy_state = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Bring the generators back to a state.

    Args:
        state (dict[str, Any]): What :func:`random_state` gave.
    """
    random.setstate(state["python"])
    inner = state["numpy"]["state"]
    np.random.set_state({**state["numpy"], "state": {**inner, "key": np.array(inner["key"], dtype=np.uint32)}})
    torch.set_rng_state(state["torch"].cpu())
