"""Error messages: what a user can fix ends a command in one line and an exit status."""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from memfree.console import say
from memfree.slurm.launcher import check_variables
from memfree.slurm.requeue import requeued_when_warned

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
    options = [option for action in parser._actions for option in action.option_strings]
    new = getattr(parser, "new_options", ())  # of mitigations, whose old names are not suggested
    return [*new, *(option for option in options if not option.startswith("--guidance."))]


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


DEBUG_VARIABLE = "MEMFREE_DEBUG"
INTERRUPTED = "memfree: interrupted"


def guarded(call: Callable[[], Any], goes_on: bool = True) -> Any:
    """Turn what the user can mend into one line and an exit status.

    Args:
        call: what to do.
        goes_on: whether what it had done is kept when it is stopped and started again.
    """
    try:
        check_variables()  # importing Lightning reads them
        with requeued_when_warned(goes_on):
            return call()
    except BrokenPipeError:
        # The reader of our output has gone (``| head``); the interpreter must not flush to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except _mendable() as error:
        if os.environ.get(DEBUG_VARIABLE):
            traceback.print_exc()
        exit_with_error(message_of(error))
    except KeyboardInterrupt:
        _exit_interrupted()
    except SystemExit as error:
        # Lightning turns Ctrl-C into an exit with status 1.
        if error.code == 1 and isinstance(error.__context__, KeyboardInterrupt):
            _exit_interrupted()
        raise


def _mendable() -> tuple[type[Exception], ...]:
    """What is raised for the user to mend; of heavy modules only if they are imported at all."""
    heavy = {
        "memfree.out_of_memory": "ExplainedOutOfMemoryError",
        "lightning.fabric.utilities.exceptions": "MisconfigurationException",
    }
    # An import may have been interrupted.
    found = [getattr(sys.modules.get(module), name, None) for module, name in heavy.items()]
    return (ValueError, OSError, *(error for error in found if error is not None))


def message_of(error: Exception) -> str:
    """What an error says, without Python's ``[Errno 2]`` and Lightning's addresses."""
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (ValueError, OSError, RuntimeError)):
        return str(error)
    from memfree.training.trainer import first_line

    return first_line(error)


def _exit_interrupted() -> NoReturn:
    print(INTERRUPTED, file=sys.stderr)
    raise SystemExit(130) from None


def exit_with_error(message: str) -> NoReturn:
    """End the process with status 2 and ``message`` as the one line of it."""
    line = re.sub(" {2,}", " ", " ".join(message.splitlines()).replace("\t", " ")).strip()
    say(f"memfree: error: {line}", stderr=True)
    raise SystemExit(2)
