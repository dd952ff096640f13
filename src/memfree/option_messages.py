"""What is wrong with an option, in one line that names it as on the command line."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# What jsonargparse says of a YAML key that no option has, and how it spells types.
_UNKNOWN_KEY = re.compile(r"Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'")
_TYPE_NOISE = re.compile(
    r"<class '(?:[\w.]+\.)?(?P<name>\w+)'>|typing\.(?=[A-Z])|jsonargparse\.(?:typing\.)?(?=[A-Z])"
)
_UNION = re.compile(
    r"Does not validate against any of the Union subtypes\s+Subtypes: \[(?P<types>.*?)\]\s+Errors:"
    r".*\sGiven value: (?P<value>.*)",
    re.DOTALL,
)
_DENIED = re.compile(
    r"Importing '(?P<path>[^']*)' is not allowed, denied by .* to allow it\.", re.DOTALL
)

_CALLED = {"--font": ("--path", "FONT, with --source emoji")}
"""Options that one may look for by another name, how they are called, and with what."""


def options_of(parser: ArgumentParser) -> list[str]:
    """All options of a parser as they are typed, ``--help`` and ``-h`` included."""
    return [option for action in parser._actions for option in action.option_strings]


def option_message(message: str, parser: ArgumentParser) -> str:
    """Say jsonargparse's message in terms of the options on the command line."""
    options = options_of(parser)
    if message.startswith("unrecognized arguments: "):
        rest = message.removeprefix("unrecognized arguments: ")
        option = rest.split()[0].split("=")[0]
        if option in _CALLED and _CALLED[option][0] in options:
            return f"unknown option {option}: give it as {' '.join(_CALLED[option])}; see --help"
        return f"unknown option {option}{did_you_mean(option, options)}; see --help"
    if message.startswith("the following arguments are required: "):
        names = message.removeprefix("the following arguments are required: ").split(", ")
        return f"missing option {', '.join('--' + name for name in names)}; see --help"
    if unknown := _UNKNOWN_KEY.search(message):
        option = f"--{unknown['group']}.{unknown['key']}"
        return f"unknown option {option}{did_you_mean(option, options)}; see --help"
    if message.startswith('Parser key "'):
        key, _, reason = message.removeprefix('Parser key "').partition('"')
        message = f"--{key}:{reason.lstrip(':')}"
    message = _UNION.sub(_one_of, message)
    message = _DENIED.sub(_no_class, message)
    return f"{_TYPE_NOISE.sub(_type_name, message)}; see --help"


def did_you_mean(word: str, known: list[str]) -> str:
    """The nearest known word as a question to append, or nothing where none is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {near[0]}?" if near else ""


def _type_name(match: re.Match[str]) -> str:
    return match["name"] or ""


def _no_class(match: re.Match[str]) -> str:
    return f"{match['path']!r} is not a set of options: options and configs may not name classes"


def _one_of(match: re.Match[str]) -> str:
    types = match["types"].replace("NoneType", "null")
    return f"Expected one of {types}. Got value: {match['value']}"
