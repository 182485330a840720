# SPDX-License-Identifier: Apache-2.0
"""The console of a run: each line once."""

import logging
import sys

from rich.logging import RichHandler

#: The loggers that anomalib's command line gives a second handler to.
_TWICE = (None, "lightning.pytorch")


def print_each_line_once() -> None:
    """Let each line of the log be printed once: anomalib's command line prints it plainly, and again with rich.

    Handlers that write elsewhere, such as to a file, stay.

    Example:
        >>> print_each_line_once()  # (nothing to do without anomalib's command line)
    """
    for name in _TWICE:
        logger = logging.getLogger(name)
        if any(isinstance(handler, RichHandler) for handler in logger.handlers):
            for handler in list(logger.handlers):
                if type(handler) is logging.StreamHandler and handler.stream in (sys.stdout, sys.stderr):
                    logger.removeHandler(handler)
