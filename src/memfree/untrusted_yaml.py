"""Option files in YAML: limits on their size, also once their aliases are written out; no doubt
about what they say, and no further files."""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from memfree.untrusted import short

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
        ValueError: a file is a FIFO, device or socket, too large, or not UTF-8; the message names
            it.
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
        if stat.S_ISREG(found.st_mode):
            try:
                Path(name).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"--config {name} is not UTF-8; save it as UTF-8") from error
            except OSError as error:
                raise ValueError(f"--config {name} cannot be read: {error.strerror}") from error


def check_no_further_files(words: Sequence[str], groups: Sequence[str]) -> None:
    """Refuse a path in place of a set of options, which the parser would open.

    Args:
        words: the options of a command.
        groups: names of its sets of options, such as ``plan``. YAML that is not well formed is left
            to the parser.

    Raises:
        ValueError: ``--plan FILE``, or an option file that names a further one.
    """
    options = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
    options |= {word.removeprefix("--"): after for word, after in pairwise(words)}
    for group in groups:
        if group in options and isinstance(_loaded(options[group]), str):
            raise ValueError(f"--{group} {short(options[group])} is not a set of options")
    for name in config_files(words):
        if not Path(name).is_file():  # such as the pipe of ``--config <(command)``
            continue
        value = _loaded(Path(name).read_text(encoding="utf-8"))
        if isinstance(value, dict) and "config" in value:
            raise ValueError(
                f"--config {name} names further option files ({short(value['config'])}): give "
                "each on the command line"
            )
        for group in groups:
            for given in _of_group(value, group.split(".")):
                if isinstance(given, str):
                    raise ValueError(
                        f"--config {name}: {group} is {short(given)}, not a set of options"
                    )


def _loaded(text: str) -> Any:
    """The value of a YAML text, None where it is not well formed."""
    import yaml  # `memfree --help` should not wait for it

    check_yaml(text)
    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def _of_group(value: Any, names: list[str]) -> Iterator[Any]:
    """What an option file gives for a set of options: ``a: {b: …}`` or ``a.b: …``."""
    if not isinstance(value, dict):
        return
    for count in range(1, len(names) + 1):
        name, rest = ".".join(names[:count]), names[count:]
        if name in value and rest:
            yield from _of_group(value[name], rest)
        elif name in value:
            yield value[name]


def config_files(words: Sequence[str]) -> list[str]:
    """The files that stand behind ``--config`` on a command line."""
    files = [after for word, after in pairwise(words) if word == "--config"]
    return files + [
        word.removeprefix("--config=") for word in words if word.startswith("--config=")
    ]


def check_yaml(text: str) -> None:
    """Refuse YAML whose aliases (``*name``) would take memory without measure, or that says a thing
    twice, where the parser would take the last.

    YAML that is not well formed is left to whoever reads it next.

    Raises:
        ValueError: written out, it has more than ``MAX_YAML`` values and characters, it contains
            itself, or an object has a key twice.
    """
    if "*" not in text and ":" not in text:  # neither aliases nor objects
        return
    import yaml  # `memfree --help` should not wait for it

    sizes: dict[int, int] = {}
    twice: list[str] = []

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = MAX_YAML + 1  # of a node that contains itself
            if isinstance(node, yaml.MappingNode):
                twice.extend(_repeated(key.value for key, _ in node.value))
                inner = sum(size(part) for pair in node.value for part in pair)
            elif isinstance(node, yaml.SequenceNode):
                inner = sum(size(part) for part in node.value)
            else:
                inner = len(node.value)
            sizes[id(node)] = 1 + inner
        return sizes[id(node)]

    try:
        root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        total = size(root) if root is not None else 0
        large = "*" in text and total > MAX_YAML  # without aliases it is no more than its bytes
    except yaml.YAMLError:
        return
    except RecursionError:
        raise ValueError("--config: its YAML is nested too deeply") from None
    if large:
        raise ValueError(
            f"--config: its YAML has aliases that unpack to more than {MAX_YAML} values, or that "
            "contain themselves"
        )
    if twice:
        raise ValueError(f"--config: {short(twice[0], 60)} stands there twice; leave one")


def _repeated(keys: Iterator[Any]) -> list[str]:
    """Keys of one object that are there more than once; ``<<`` takes keys from elsewhere."""
    count = Counter(key for key in keys if isinstance(key, str) and key != "<<")
    return [key for key, number in count.items() if number > 1]


def limit_aliases() -> None:
    """Put ``check_yaml`` before everything that jsonargparse reads as YAML."""
    from jsonargparse import get_loader, set_loader
    from yaml import YAMLError

    loader = get_loader("yaml")
    if loader.__module__ == __name__:
        return

    def checked(text: str) -> Any:
        check_yaml(text)
        try:
            return loader(text)
        except YAMLError:
            raise
        except ValueError as error:  # a number of thousands of digits
            raise ValueError(f"--config: {short(error)}") from error

    set_loader("yaml", checked, (YAMLError,))
