# SPDX-License-Identifier: Apache-2.0
"""What the processes of a run decide together, without asking each other at every step."""

import time

import torch
from lightning.pytorch import Trainer

#: Seconds from one meeting to the next, about.
_BETWEEN_MEETINGS = 2.0
_MOST_STEPS = 10_000


class Agreement:
    """Meetings of the processes of a run, at which a wish of one becomes the decision of all.

    Asking the others stops a process until the slowest has answered. So they meet every few steps, as many as take
    about two seconds, and agree at each meeting on when the next one is. A single process meets itself at every step.

    Example:
        >>> agreement = Agreement()
        >>> agreement.is_due(Trainer(logger=False, accelerator="cpu"))
        True
    """

    def __init__(self) -> None:
        self._steps = 0
        self._until = 1
        self._met_at = time.monotonic()

    def is_due(self, trainer: Trainer) -> bool:
        """Count a step, and tell whether all meet after it.

        Args:
            trainer (Trainer): The trainer of this process.

        Returns:
            bool: The same in every process.
        """
        self._steps += 1
        return trainer.world_size == 1 or self._steps >= self._until

    def any_of(self, trainer: Trainer, *wishes: bool) -> list[bool]:
        """Meet: every process must call this after the same step.

        Args:
            trainer (Trainer): The trainer of this process.
            *wishes (bool): What this process wants.

        Returns:
            list[bool]: For each, whether any process wants it.
        """
        now = time.monotonic()
        a_step = (now - self._met_at) / max(self._steps, 1)
        asked = torch.tensor([*map(float, wishes), a_step], device=trainer.strategy.root_device)
        *decided, slowest_step = trainer.strategy.reduce(asked, reduce_op="max").tolist()
        self._until = min(_MOST_STEPS, max(1, int(_BETWEEN_MEETINGS / max(slowest_step, 1e-9))))
        self._steps, self._met_at = 0, now
        return [value > 0 for value in decided]
