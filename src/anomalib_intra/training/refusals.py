# SPDX-License-Identifier: Apache-2.0
"""How an error ends a command: a sentence where it is for the user to mend, a traceback where a program is at fault."""

import linecache
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

#: Packages that refuse what users give, files above all, in sentences.
_REFUSING = ("anomalib_intra.", "anomalib.data.")

_Built = TypeVar("_Built")


def is_refusal(error: Exception) -> bool:
    """Tell whether an error is meant for the user: a file is missing, or we, or what reads images, said no on purpose.

    Args:
        error (Exception): An error that was raised.

    Returns:
        bool: Whether it was raised by a ``raise`` of ours; one that comes out of any other line is a fault.

    Example:
        >>> try:
        ...     int("two")
        ... except ValueError as error:
        ...     is_refusal(error)
        False
    """
    if isinstance(error, FileNotFoundError):
        return True
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    statement = linecache.getline(frame.f_code.co_filename, line, frame.f_globals)
    return frame.f_globals.get("__name__", "").startswith(_REFUSING) and statement.lstrip().startswith("raise ")


def sentence_of_refusal(error: Exception) -> str | None:
    """Give what an error says where it is meant for the user.

    Args:
        error (Exception): An error that was raised.

    Returns:
        str | None: Its sentence; None where a program is at fault.
    """
    return str(error) if is_refusal(error) else None


@contextmanager
def refusing(
    sentence_of: Callable[[Exception], str | None] = sentence_of_refusal, name: str = "anomalib-intra"
) -> Iterator[None]:
    """End with a sentence and exit code 2 where a command cannot do what it is asked for.

    Args:
        sentence_of (Callable): Gives the sentence of an error; None lets it go on as it is.
        name (str): Name of the command.
    """
    try:
        yield
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        logger.debug("This ended the command.", exc_info=error)
        sys.stderr.write(f"{name}: {sentence}\n")
        sys.exit(2)


def build(class_type: type[_Built], *args: Any, **kwargs: Any) -> _Built:
    """Build what a command line asks for, as an instantiator of jsonargparse.

    jsonargparse wraps what a constructor says into what it thinks of each type that the argument may have.

    Args:
        class_type (type): Class of a model, a datamodule or a part of them.
        *args (Any): Its arguments.
        **kwargs (Any): The same.

    Returns:
        Any: The object.
    """
    with refusing():
        return class_type(*args, **kwargs)
