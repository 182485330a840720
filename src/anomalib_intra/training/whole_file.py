# SPDX-License-Identifier: Apache-2.0
"""Files that a run goes on from are never half written."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file beside the old one and then put it in its place, in one step.

    Args:
        path (Path): The file.
        text (str): All that it is to hold.
    """
    draft = path.with_suffix(".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
