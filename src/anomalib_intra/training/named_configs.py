# SPDX-License-Identifier: Apache-2.0
"""The configs that come with the package, by name: a person who installed it has no checkout to point into."""

from collections.abc import Sequence
from pathlib import Path

_IN_WHEEL, _IN_CHECKOUT = Path(__file__).parents[1] / "configs", Path(__file__).parents[3] / "configs"

#: Folder of the configs.
CONFIGS = _IN_WHEEL if _IN_WHEEL.is_dir() else _IN_CHECKOUT


def config_names() -> list[str]:
    """Name all configs that come with the package.

    Returns:
        list[str]: Names, those in folders last.

    Example:
        >>> [name for name in config_names() if "bottle" in name or "start" in name]
        ['quickstart', 'mvtec/bottle']
    """
    names = (path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))
    return sorted(names, key=lambda name: ("/" in name, name))


def find_config(name: str) -> str:
    """Find a config by its name; a file of that name goes first.

    Args:
        name (str): Name, such as ``mvtec/bottle``, or path. Text of a config and addresses, which the parser of the
            command line reads too, have a colon and stay as they are.

    Returns:
        str: Its path.

    Raises:
        FileNotFoundError: If there is neither a file nor a config of that name.

    Example:
        >>> Path(find_config("quickstart")).name
        'quickstart.yaml'
    """
    if ":" in name or (Path(name).exists() and not Path(name).is_dir()):
        return name
    if name.removesuffix(".yaml") not in config_names():
        msg = f"There is no config {name}: give the path of a YAML file, or one of {', '.join(config_names())}."
        raise FileNotFoundError(msg)
    return str(CONFIGS / f"{name.removesuffix('.yaml')}.yaml")


def with_config_paths(arguments: Sequence[str]) -> list[str]:
    """Put the paths of configs in the place of their names.

    Args:
        arguments (Sequence[str]): Arguments of any command.

    Returns:
        list[str]: The same, with the path after each ``--config`` or ``-c``.

    Raises:
        FileNotFoundError: If there is no config of such a name.

    Example:
        >>> with_config_paths(["train", "--config", "pyproject.toml"])
        ['train', '--config', 'pyproject.toml']
    """
    paths = list(arguments)
    for number, (before, word) in enumerate(zip(["", *arguments], arguments, strict=False)):
        if word.startswith("--config="):
            paths[number] = f"--config={find_config(word.removeprefix('--config='))}"
        elif before in ("--config", "-c") and not word.startswith("-"):
            paths[number] = find_config(word)
    return paths
