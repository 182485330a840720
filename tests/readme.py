# SPDX-License-Identifier: Apache-2.0
"""What the README tells its readers to type."""

import re
import shlex

from .conftest import CONFIGS

ROOT = CONFIGS.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def blocks_of(text: str) -> list[tuple[str, str]]:
    """Find the contents of the fenced blocks of a page, with their languages."""
    return _FENCED.findall(text)


BLOCKS = blocks_of(TEXT)
#: What stands between backticks in text and tables.
SPANS: list[str] = re.findall(r"`([^`\n]+)`", _FENCED.sub("", TEXT))

Words = list[str]


def options_of_comments(script: str) -> list[Words]:
    """Find the options that comments of a shell speak of."""
    return [option.split() for option in re.findall(r"#.*?(--\S+ \w+)", script)]


def commands(script: str) -> list[Words]:
    """Split lines of a shell into the words of each command, without comments."""
    lines = script.replace("\\\n", " ").splitlines()
    parts = (re.split(r"\s&&\s", line) for line in lines)
    return [words for line in parts for part in line if (words := shlex.split(part, comments=True))]


def quickstart() -> Words:
    """Find the command that trains on the generated data."""
    (words,) = [words for _, block in BLOCKS for words in commands(block) if "configs/quickstart.yaml" in words]
    return words
