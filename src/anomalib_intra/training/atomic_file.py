# SPDX-License-Identifier: Apache-2.0
"""Files that a run goes on from are never half written."""

import os
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4


def write_atomically(path: Path, content: str | Callable[[Path], object]) -> None:
    """Write a file beside the old one and then put it in its place, in one step.

    A full disk, a lost connection or a kill while writing leaves the old file as it was. Two processes that write the
    same file do not get into each other's way: the last one's stays.

    Args:
        path (Path): The file; its folder is made.
        content (str | Callable): All that it is to hold, or a function that writes it to a path.

    Raises:
        OSError: If it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(Path(folder) / "losses.csv", "epoch,val_loss")
        ...     [file.name for file in Path(folder).iterdir()]
        ['losses.csv']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Numbers of processes are the same in many containers, which may share a folder.
    part = path.with_name(f"{path.name}.{uuid4().hex}.part")
    try:
        if callable(content):
            content(part)
        else:
            part.write_text(content, encoding="utf-8")
        with part.open("r+b") as written:  # (Windows flushes only what is open for writing)
            os.fsync(written.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
