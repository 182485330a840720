# SPDX-License-Identifier: Apache-2.0
"""Stops a training run whose loss is no number any more, before its weights reach a checkpoint."""

from collections.abc import Callable

import torch


class FiniteLoss:
    """Watches the loss of every step.

    On an accelerator, a step's loss is looked at when the next step has been handed over, so that the device never
    waits; :meth:`check` looks at what is left, before a checkpoint is saved.

    Example:
        >>> losses = FiniteLoss()
        >>> losses.watch(torch.tensor(0.5), "step 1: {}".format)
        >>> losses.watch(torch.tensor(float("nan")), "step 2: {}".format)
        Traceback (most recent call last):
        ...
        FloatingPointError: step 2: nan
    """

    def __init__(self) -> None:
        self._waiting: tuple[torch.Tensor, Callable[[float], str]] | None = None

    def watch(self, loss: torch.Tensor, explain: Callable[[float], str]) -> None:
        """Take the loss of a step.

        Args:
            loss (torch.Tensor): The loss, a scalar.
            explain (Callable): Gives the message for a loss that is not finite.

        Raises:
            FloatingPointError: If a loss is NaN or infinite.
        """
        self.check()
        self._waiting = (loss.detach(), explain)
        if loss.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Look at the last loss, if that has not been done.

        Raises:
            FloatingPointError: If it is NaN or infinite.
        """
        if self._waiting is None:
            return
        (loss, explain), self._waiting = self._waiting, None
        if not torch.isfinite(loss):
            raise FloatingPointError(explain(float(loss)))
