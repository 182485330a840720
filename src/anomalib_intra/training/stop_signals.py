# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and signals to terminate, heeded between two steps."""

import logging
import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Listens to signals while a model trains, in the place of those that listened before.

    Lightning's own listener tells the other processes from within the signal, which waits for ever where they are in
    the middle of something else.
    """

    def __init__(self) -> None:
        #: Whether the training should stop after this step.
        self.told_to_stop = False
        self._before: dict[signal.Signals, Any] = {}

    def listen(self, trainer: Trainer) -> None:
        """Begin to listen; a thread other than the main one hears no signals.

        Args:
            trainer (Trainer): The trainer.
        """
        self.told_to_stop = False
        if threading.current_thread() is not threading.main_thread():
            return

        def heed(number: int, frame: FrameType | None) -> None:
            del number, frame
            # One process alone need not wait for the end of a validation. Several do: all stop after the same step.
            if self.told_to_stop or (trainer.world_size == 1 and not trainer.training):
                raise KeyboardInterrupt
            self.told_to_stop = True
            logger.warning("Stopping after this step. Ctrl-C again stops at once.")

        for one in _SIGNALS:
            before = signal.signal(one, heed)
            self._before.setdefault(one, before)

    def leave(self) -> None:
        """Let those listen again that did before."""
        for one, listener in self._before.items():
            # None: it was not set from Python.
            signal.signal(one, signal.SIG_DFL if listener is None else listener)
        self._before.clear()
