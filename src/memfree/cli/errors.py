"""Error messages: errors that users can fix end a command with one line and an exit status."""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from memfree.console import say
from memfree.slurm.launcher import check_variables
from memfree.slurm.requeue import requeued_when_warned

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

_UNRECOGNIZED = "unrecognized arguments: "
_UNKNOWN_KEY = re.compile(r"Group '([^']+)' does not accept option '([^']+)'")
_REQUIRED = "the following arguments are required: "
_DENIED = re.compile(r"Importing ('[^']*') is not allowed, denied by .* to allow it\.", re.DOTALL)
_NO_CLASS = r"\1 is not a set of options: options and configs may not name classes"
_EXPECTED = re.compile(
    r"(?:Does not validate against any of the Union subtypes\s+Subtypes: \[(.*?)\]"
    r"|Expected an? (?:Literal\[(.*?)\]|(.*?))\.)\s+(?:Given|Got) value: ",
    re.DOTALL,
)
"""jsonargparse's messages for a wrong type: of a union, of fixed words, or of one type."""
_TYPE_NOISE = ("<class '", "'>", "jsonargparse.typing.", "jsonargparse.", "typing.")
_CALLED = {"--font": ("--path", "FONT, with --source emoji")}
"""Options that users may look for by another name: what they are called, and with what."""


def options_of(parser: ArgumentParser) -> list[str]:
    """All options of a parser as typed, ``--help`` and ``-h`` included."""
    options = [option for action in parser._actions for option in action.option_strings]
    new = getattr(parser, "new_options", ())  # never suggest old names of mitigations
    return [*new, *(option for option in options if option.split(".")[0] != "--guidance")]


def option_message(message: str, parser: ArgumentParser) -> str:
    """Rephrase jsonargparse's message in terms of command-line options."""
    if message.startswith(_REQUIRED):
        names = message.removeprefix(_REQUIRED).split(", ")
        return f"missing option {', '.join('--' + name for name in names)}; see --help"
    unknown = ""
    if message.startswith(_UNRECOGNIZED):
        unknown = message.removeprefix(_UNRECOGNIZED).split()[0].split("=")[0]
    elif match := _UNKNOWN_KEY.search(message):
        unknown = f"--{match[1]}.{match[2]}"
    if unknown:
        options = options_of(parser)
        option, what = _CALLED.get(unknown, ("", ""))
        if option in options:
            return f"unknown option {unknown}: give it as {option} {what}; see --help"
        return f"unknown option {unknown}{did_you_mean(unknown, options)}; see --help"
    if message.startswith('Parser key "'):
        key, _, reason = message.removeprefix('Parser key "').partition('"')
        message = f"--{key}:{reason.lstrip(':')}"
    # The message of each type in a union repeats the list of types.
    before, errors, after = message.partition("Errors:\n")
    if errors:
        message = f"{before}Given value: {after.rpartition('Given value: ')[2]}"
    message = _DENIED.sub(_NO_CLASS, message)
    for noise in _TYPE_NOISE:
        message = message.replace(noise, "")
    message = _EXPECTED.sub(_expected, message)
    return f"{message}; see --help"


def _expected(match: re.Match[str]) -> str:
    union, words, one = match.groups()
    if one:
        return f"expected {one}, got "
    names = (union or words).replace("'", "").replace("NoneType", "null")
    return f"expected one of {names}, got "


@contextmanager
def named_option(option: str) -> Iterator[None]:
    """Put the option's name before an error about its value."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{option}: {error}") from error


def did_you_mean(word: str, known: list[str]) -> str:
    """The nearest known word as a question to append; empty where none is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {near[0]}?" if near else ""


def unknown_command(word: str, known: list[str]) -> str:
    """The message for a word that is not a known command."""
    near = did_you_mean(word, known)
    return f"unknown command {word!r}{near}; commands are {', '.join(known)}"


DEBUG_VARIABLE = "MEMFREE_DEBUG"
INTERRUPTED = "memfree: interrupted"


def guarded(call: Callable[[], Any], goes_on: bool = True) -> Any:
    """Report errors that the user can fix as one line and exit with their status.

    ``goes_on``: whether a stopped ``call`` resumes when it is started again.
    """
    try:
        check_variables()  # importing Lightning reads them
        with requeued_when_warned(goes_on):
            return call()
    except BrokenPipeError:
        # Our output's reader has gone (``| head``); the interpreter must not flush to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except _fixable() as error:
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


def _fixable() -> tuple[type[Exception], ...]:
    """Errors that a user can fix; those of heavy modules only if they are already imported."""
    heavy = {
        "memfree.out_of_memory": "ExplainedOutOfMemoryError",
        "lightning.fabric.utilities.exceptions": "MisconfigurationException",
    }
    # An import may have been interrupted.
    errors = [getattr(sys.modules.get(module), name, None) for module, name in heavy.items()]
    return (ValueError, OSError, *(error for error in errors if error is not None))


def message_of(error: Exception) -> str:
    """An error's message without Python's ``[Errno 2]`` and Lightning's addresses."""
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
    """End the process with status 2 and ``message`` on one line of stderr."""
    line = re.sub(" {2,}", " ", " ".join(message.splitlines()).replace("\t", " ")).strip()
    say(f"memfree: error: {line}", stderr=True)
    raise SystemExit(2)
