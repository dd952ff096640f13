"""Option files in YAML: limits on their size, also once their aliases are written out."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

MAX_CONFIG_BYTES = 4 << 20
"""Largest option file that is read, bytes."""
MAX_YAML = 1 << 20
"""Values and characters that a YAML text may have once its aliases are written out."""
_OPENED = ("/dev/fd/", "/proc/self/fd/", "/dev/stdin")  # ``--config <(command)`` of a shell


def check_config_files(words: Sequence[str]) -> None:
    """Refuse a ``--config`` that has no end, or that nobody writes to.

    Args:
        words: the options of a command. A file that is missing is left to the parser.

    Raises:
        ValueError: a file is a FIFO, device or socket, or too large; the message names it.
    """
    for name in config_files(words):
        try:
            found = Path(name).stat()
        except (OSError, ValueError):
            continue
        if stat.S_ISFIFO(found.st_mode) and name.startswith(_OPENED):
            continue
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise ValueError(f"--config {name} is no plain file")
        if found.st_size > MAX_CONFIG_BYTES and stat.S_ISREG(found.st_mode):
            raise ValueError(
                f"--config {name} has {found.st_size} bytes, the limit is {MAX_CONFIG_BYTES}"
            )


def config_files(words: Sequence[str]) -> list[str]:
    """The files that stand behind ``--config`` on a command line."""
    files = [after for word, after in pairwise(words) if word == "--config"]
    return files + [
        word.removeprefix("--config=") for word in words if word.startswith("--config=")
    ]


def check_yaml(text: str) -> None:
    """Refuse YAML whose aliases (``*name``) would take memory without measure.

    YAML that is not well formed is left to whoever reads it next.

    Raises:
        ValueError: written out, it has more than ``MAX_YAML`` values and characters, or it
            contains itself.
    """
    if "*" not in text:  # no alias, so no more than its own bytes
        return
    import yaml  # `memfree --help` should not wait for it

    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = MAX_YAML + 1  # of a node that contains itself
            if isinstance(node, yaml.MappingNode):
                inner = sum(size(part) for pair in node.value for part in pair)
            elif isinstance(node, yaml.SequenceNode):
                inner = sum(size(part) for part in node.value)
            else:
                inner = len(node.value)
            sizes[id(node)] = 1 + inner
        return sizes[id(node)]

    try:
        root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        large = root is not None and size(root) > MAX_YAML
    except yaml.YAMLError:
        return
    except RecursionError:
        raise ValueError("--config: its YAML is nested too deeply") from None
    if large:
        raise ValueError(
            f"--config: its YAML has aliases that unpack to more than {MAX_YAML} values, or that "
            "contain themselves"
        )


def limit_aliases() -> None:
    """Put ``check_yaml`` before everything that jsonargparse reads as YAML."""
    from jsonargparse import get_loader, set_loader
    from yaml import YAMLError

    loader = get_loader("yaml")
    if loader.__module__ == __name__:
        return

    def checked(text: str) -> Any:
        check_yaml(text)
        return loader(text)

    set_loader("yaml", checked, (YAMLError,))
