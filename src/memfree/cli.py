"""Typed functions as commands: ``run`` for a script's function, ``main`` for ``memfree VERB``."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser, set_parsing_settings

from memfree import __version__

DEBUG_VARIABLE = "MEMFREE_DEBUG"

# What jsonargparse says of a YAML key that no option has, and how it spells types.
_UNKNOWN_KEY = re.compile(r"Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'")
_TYPE_NOISE = re.compile(r"<class '(?P<name>[^']+)'>|typing\.(?=[A-Z])")


class Command(NamedTuple):
    """One verb of ``memfree``: where its function is, imported only when it is called."""

    function: str
    help: str


COMMANDS = {
    "prepare": Command("memfree.data:prepare", "turn a source into a dataset folder of shards"),
    "index": Command("memfree.indexing:index", "build and calibrate a reference index"),
    "evaluate": Command("memfree.evaluation:evaluate", "measure memorization and quality"),
    "report": Command("memfree.evaluation:report", "write the HTML page of an evaluation"),
    "tune": Command("memfree.tuning:tune", "find the smallest strengths that leave no copy"),
    "study": Command("memfree.study:study", "run a grid of configurations and tabulate it"),
    "demo": Command("memfree.demo:demo", "induce, measure and remove memorization on digits"),
}


def run(
    function: Callable[..., Any], args: Sequence[str] | None = None, prog: str | None = None
) -> Any:
    """Call a typed function with arguments from the command line and from YAML files.

    Every parameter is an option; fields of dataclasses and of a data module are options below it
    (``--data.batch_size``). ``--config FILE`` reads options from YAML, several files layer, and
    what stands later on the line wins. Where the function has a parameter ``out`` and leaves a
    folder there, the resolved configuration is saved in it as ``config.yaml``.

    Args:
        function: annotated and documented; its docstring and those of its dataclasses are the
            text of ``--help``.
        args: the command line without the program's name, None for ``sys.argv[1:]``.
        prog: the name in the usage line, None for the script's.

    Returns:
        What ``function`` returns.

    Raises:
        SystemExit: with status 2 and one line on stderr for an unknown or wrong option and for a
            ValueError or OSError of the function; with 130 after Ctrl-C. The environment variable
            MEMFREE_DEBUG=1 adds the traceback.
    """
    parser = _parser(function, prog)
    arguments = sys.argv[1:] if args is None else list(args)
    try:
        config = parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        _exit_with_error(_option_message(str(error), parser))
    return _guarded(lambda: _call(function, parser, config))


def main(args: Sequence[str] | None = None) -> Any:
    """Entry point of the console script: ``memfree VERB [options]``."""
    arguments = sys.argv[1:] if args is None else list(args)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return None
    verb, rest = arguments[0], arguments[1:]
    if verb == "--version":
        print(f"memfree {__version__}")
        return None
    if verb not in COMMANDS:
        _exit_with_error(
            f"unknown command {verb!r}{_did_you_mean(verb, list(COMMANDS))}; "
            f"commands are {', '.join(COMMANDS)}"
        )
    function = _guarded(lambda: load(COMMANDS[verb]))
    return run(function, rest, prog=f"memfree {verb}")


def load(command: Command) -> Callable[..., Any]:
    """Import a command's function."""
    module, name = command.function.split(":")
    return getattr(importlib.import_module(module), name)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: memfree COMMAND [options]",
            "",
            "Induce, measure and remove the memorization of training images in diffusion models.",
            "",
            "commands:",
            *lines,
            "",
            "memfree COMMAND --help explains a command's options; train.py and sample.py train and",
            f"sample. {DEBUG_VARIABLE}=1 shows where an error came from.",
        ]
    )


def _parser(function: Callable[..., Any], prog: str | None) -> ArgumentParser:
    set_parsing_settings(
        docstring_parse_attribute_docstrings=True, subclasses_disabled=[_is_data_module]
    )
    parser = ArgumentParser(
        prog=prog,
        description=_description(function),
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action="config", help="YAML file with options; may be given several times."
    )
    parser.add_function_arguments(function, fail_untyped=True, as_group=False)
    return parser


def _is_data_module(kind: type) -> bool:
    """Whether options of this class stand directly under its name, without ``class_path``."""
    return any(base.__name__ == "LightningDataModule" for base in inspect.getmro(kind))


def _description(function: Callable[..., Any]) -> str:
    """The docstring up to its first section: the rest is the text of the options."""
    lines: list[str] = []
    for line in (inspect.getdoc(function) or "").splitlines():
        if line.strip() in ("Args:", "Returns:", "Raises:", "Yields:", "Example:", "Examples:"):
            break
        lines.append(line)
    return "\n".join(lines).strip()


def _call(function: Callable[..., Any], parser: ArgumentParser, config: Any) -> Any:
    # Here, not above: manifest imports torch, and `memfree --help` should not wait for it.
    from memfree.resolved import resolved_config, save_config

    arguments = parser.instantiate(config)
    arguments.pop("config", None)
    with resolved_config(parser.dump(config)):
        result = function(**arguments)
        out = arguments.get("out")
        if isinstance(out, Path) and out.is_dir():
            save_config(out)
    return result


def _guarded(call: Callable[[], Any]) -> Any:
    """Turn what the user can mend into one line and an exit status."""
    try:
        return call()
    except BrokenPipeError:
        # The reader of our output has gone (``| head``); the interpreter must not flush to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        if os.environ.get(DEBUG_VARIABLE):
            traceback.print_exc()
        _exit_with_error(_os_message(error) if isinstance(error, OSError) else str(error))
    except KeyboardInterrupt:
        print("memfree: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _os_message(error: OSError) -> str:
    """The message of an OSError, without Python's ``[Errno 2]``."""
    if error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


def _exit_with_error(message: str) -> Any:
    print(f"memfree: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def _option_message(message: str, parser: ArgumentParser) -> str:
    """Say jsonargparse's message in terms of the options on the command line."""
    options = [option for action in parser._actions for option in action.option_strings]
    if message.startswith("unrecognized arguments: "):
        rest = message.removeprefix("unrecognized arguments: ")
        option = rest.split()[0].split("=")[0]
        return f"unknown option {option}{_did_you_mean(option, options)}; see --help"
    if message.startswith("the following arguments are required: "):
        names = message.removeprefix("the following arguments are required: ").split(", ")
        return f"missing option {', '.join('--' + name for name in names)}; see --help"
    if unknown := _UNKNOWN_KEY.search(message):
        option = f"--{unknown['group']}.{unknown['key']}"
        return f"unknown option {option}{_did_you_mean(option, options)}; see --help"
    if message.startswith('Parser key "'):
        key, _, reason = message.removeprefix('Parser key "').partition('"')
        message = f"--{key}:{reason.lstrip(':')}"
    return f"{_TYPE_NOISE.sub(_type_name, message)}; see --help"


def _type_name(match: re.Match[str]) -> str:
    return match["name"] or ""


def _did_you_mean(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {near[0]}?" if near else ""
