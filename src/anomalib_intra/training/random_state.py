# SPDX-License-Identifier: Apache-2.0
"""The state of all random numbers, which a run that goes on takes up again."""

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Read the states of the generators of Python, NumPy and torch, that of this process's accelerator among them.

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
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    on_accelerator = {} if accelerator is None else {accelerator.type: _of(accelerator).get_rng_state()}
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "accelerator": on_accelerator,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Bring the generators back to a state.

    That of an accelerator is left as it is where the state was read on another kind, or by an older version.

    Args:
        state (dict[str, Any]): What :func:`random_state` gave.
    """
    random.setstate(state["python"])
    inner = state["numpy"]["state"]
    np.random.set_state({**state["numpy"], "state": {**inner, "key": np.array(inner["key"], dtype=np.uint32)}})
    torch.set_rng_state(state["torch"].cpu())
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type in state.get("accelerator", {}):
        _of(accelerator).set_rng_state(state["accelerator"][accelerator.type].cpu())


def _of(accelerator: torch.device) -> Any:
    return torch.get_device_module(accelerator)
