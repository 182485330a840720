# SPDX-License-Identifier: Apache-2.0
"""The console of a run: each line once, whole, above the progress bar, and nothing that a user cannot mend."""

import logging
import sys
import time
import warnings

from rich import get_console
from rich.logging import RichHandler
from rich.text import Text

#: Warnings of libraries about themselves or about what is meant so here, as regular expressions.
_NOT_THE_USERS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # Our models' hook works on the batches of a datamodule, too.
    r"\s*You have overridden `on_after_batch_transfer` in `LightningModule`",
)

_ADVERTISEMENT = "💡 Tip: "


class WholeLines(logging.Handler):
    """Prints a line for each message on rich's console, where a progress bar makes way for it.

    rich's own handler breaks lines, and with them paths, at the width of the terminal, or at 80 where there is none.

    Example:
        >>> WholeLines().handle(logging.makeLogRecord({"msg": "Training took 9 s"}))  # doctest: +SKIP
        09:12:44 Training took 9 s
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Print the time, the level of what is more than news, and the message; leave out advertisements.

        Args:
            record (logging.LogRecord): The message.
        """
        try:
            message = self.format(record)
            if message.startswith(_ADVERTISEMENT):
                return
            clock = time.strftime("%H:%M:%S ", time.localtime(record.created))
            level = f"{record.levelname} " if record.levelno > logging.INFO else ""
            styled = (level, f"logging.level.{record.levelname.lower()}")
            get_console().print(Text.assemble((clock, "log.time"), styled, message), soft_wrap=True)
        except Exception:  # what a message does wrong must not end a run
            self.handleError(record)


def print_each_line_once() -> None:
    """Let each line of the log be printed once and whole.

    anomalib's command line prints a line plainly, and again with rich; Lightning's own lines break the progress bar.
    Handlers that write elsewhere, such as to a file, stay.

    Example:
        >>> print_each_line_once()  # (nothing to do without anomalib's command line)
    """
    root = logging.getLogger()
    if not any(isinstance(handler, RichHandler) for handler in root.handlers):
        return
    of_lightning = [name for name in root.manager.loggerDict if name.startswith("lightning")]
    for logger in (root, *map(logging.getLogger, of_lightning)):
        for handler in list(logger.handlers):
            if _prints(handler):
                logger.removeHandler(handler)
        logger.propagate = True
    root.addHandler(WholeLines())


def ignore_what_no_user_can_mend() -> None:
    """Keep to themselves what libraries warn of and no argument or config would change.

    Example:
        >>> with warnings.catch_warnings():
        ...     ignore_what_no_user_can_mend()
        ...     warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use something else", stacklevel=1)
    """
    for message in _NOT_THE_USERS:
        warnings.filterwarnings("ignore", message)


def _prints(handler: logging.Handler) -> bool:
    is_plain = type(handler) is logging.StreamHandler and handler.stream in (sys.stdout, sys.stderr)
    return is_plain or isinstance(handler, RichHandler)
