"""Command line: typed functions as commands; ``memfree VERB`` is ``main``."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from memfree import __version__
from memfree.cli.errors import (
    DEBUG_VARIABLE,
    INTERRUPTED,
    did_you_mean,
    exit_with_error,
    guarded,
    option_message,
    options_of,
)
from memfree.console import say
from memfree.folders.lock import ALL, part_of
from memfree.folders.untrusted import (
    check_config_files,
    check_no_further_files,
    check_yaml,
    config_files,
    limit_aliases,
)
from memfree.slurm.launcher import Launch, advice, as_one_run, launched

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def as_options(words: Sequence[str], option: str | None) -> list[str]:
    """The words with the free one, the first or the last, as a value of ``option``.

    It goes to the front, wherever it stood: of a file with options and an option beside it, the
    option wins. A last word is free where the one before it is no option that waits for a value.

    Args:
        words: of the command line, without the program's name and the command.
        option: what the free word stands for, without dashes; None where a command has none.
    """
    given = list(words)
    if option is None or not given:
        return given
    if not given[0].startswith("-"):
        return [f"--{option}={given[0]}", *given[1:]]
    waits = given[-2].startswith("-") and "=" not in given[-2] if len(given) > 1 else True
    if given[-1].startswith("-") or waits:
        return given
    return [f"--{option}={given[-1]}", *given[:-1]]


TEXT_PLAN = {"training", "counts", "prompt_sets", "noise_seed"}
"""Options that a study's plan of a text-to-image model has, and a grid has not."""


def command_of(name: str, words: Sequence[str]) -> Command:
    """The command of a verb; ``study`` runs plans of two kinds, each with options of its own.

    Args:
        name: the verb; ``text-study`` is the former name of ``study`` for text-to-image plans.
        words: its options, ``--config FILE`` among them.
    """
    if name not in ("study", "text-study"):
        return COMMANDS[name]
    keys = {re.split(r"[=.+]", word.removeprefix("--"))[0] for word in words if word[:2] == "--"}
    keys.update(*(_keys(Path(file)) for file in config_files(words)))
    text = (name == "text-study" or keys & TEXT_PLAN) and "grids" not in keys
    return COMMANDS["text-study" if text else "study"]


def _keys(path: Path) -> set[str]:
    """Options at the top of a YAML file; none where it cannot be read, which the parser reports."""
    import yaml  # `memfree --help` should not wait for it

    try:
        text = path.read_text(encoding="utf-8")
        check_yaml(text)
        found = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return set()
    return {str(key) for key in found} if isinstance(found, dict) else set()


class Command(NamedTuple):
    """One command: where its function is, imported only when it is called."""

    function: str
    help: str
    positional: str | None = None
    """Option that a word stands for that is none (``memfree.cli.entry``)."""
    one_writer: bool = True
    """Whether it alone may write the folder of its --out; a study's commands lock their own."""
    goes_on: bool = True
    """Whether a run that was stopped goes on; others begin again."""
    libraries: tuple[str, ...] = ("torch", "lightning.pytorch", "diffusers")
    """What its work takes seconds to import, once its options are known to be right."""


COMMANDS = {
    "prepare": Command(
        "memfree.commands.prepare:prepare",
        "turn a source into a dataset folder of shards",
        goes_on=False,
        libraries=("torch",),
    ),
    "train": Command("memfree.commands.train:train", "train a model on a dataset folder"),
    "scratch": Command(
        "memfree.commands.scratch:scratch", "build a small text-to-image model from nothing"
    ),
    "train-embedding": Command(
        "memfree.commands.train_embedding:train_embedding",
        "train a small copy-detection embedding",
        goes_on=False,
    ),
    "train-clip": Command(
        "memfree.commands.train_clip:train_clip", "train a small CLIP on captions", goes_on=False
    ),
    "index": Command("memfree.commands.index:index", "build and calibrate a reference index"),
    "sample": Command("memfree.commands.sample:predict", "draw samples from a trained model"),
    "evaluate": Command(
        "memfree.commands.evaluate:evaluate", "measure memorization and quality", goes_on=False
    ),
    "report": Command(
        "memfree.commands.report:report",
        "write the HTML page of an evaluation",
        goes_on=False,
        libraries=("torch",),
    ),
    "audit": Command(
        "memfree.commands.audit:audit",
        "find copies among images from anywhere",
        positional="images",
        goes_on=False,
    ),
    "tune": Command(
        "memfree.commands.tune:tune",
        "find the smallest strengths that leave no copy",
        goes_on=False,
    ),
    "study": Command(
        "memfree.commands.study:study",
        "run a plan of many configurations and tabulate it",
        positional="config",
        one_writer=False,
        libraries=(),
    ),
    "text-study": Command(
        "memfree.commands.study:text_study",
        "the former name of study for plans of text-to-image models",
        positional="config",
        one_writer=False,
        libraries=(),
    ),
    "demo": Command(
        "memfree.commands.demo:demo",
        "induce, measure and remove memorization on digits",
        libraries=(),
    ),
}
"""Verbs of ``memfree``."""

SCRIPTS = ("train", "sample")
"""Commands that a checkout has as scripts too: ``python train.py`` is ``memfree train``."""


def run(
    function: Callable[..., Any],
    args: Sequence[str] | None = None,
    prog: str | None = None,
    one_writer: bool = True,
) -> Any:
    """Call a typed function with arguments from the command line and from YAML files.

    Every parameter is an option; fields of dataclasses are options below it
    (``--data.batch_size``). ``--config FILE`` reads options from YAML, several files layer, and
    what stands later on the line wins. The function itself saves the resolved configuration beside
    what it makes, by ``memfree.folders.manifest.save_config``: it knows whether it makes anything.

    Args:
        function: annotated and documented; its docstring and those of its dataclasses are the
            text of ``--help``.
        args: the command line without the program's name, None for ``sys.argv[1:]``.
        prog: the name in the usage line, None for the script's.
        one_writer: whether no other command may write to the folder of an option ``--out``
            meanwhile (``memfree.folders.lock``).

    Returns:
        What ``function`` returns.

    Raises:
        SystemExit: with status 2 and one line on stderr for an unknown or wrong option, for a
            ValueError or OSError of the function, and where memory runs out; with 130 after Ctrl-C.
            The environment variable MEMFREE_DEBUG=1 adds the traceback.
    """
    return guarded(lambda: _run(function, args, prog, one_writer))


def run_command(name: str, args: Sequence[str] | None = None, prog: str | None = None) -> Any:
    """``run`` the function of a command.

    What it works with is imported once its options are right, which takes seconds; Ctrl-C ends
    that too in one line.
    """
    given = as_options(sys.argv[1:] if args is None else args, COMMANDS[name].positional)
    if name == "text-study":
        print("memfree: text-study is now memfree study PLAN.yaml", file=sys.stderr)

    def call() -> Any:
        check_config_files(given)
        command = command_of(name, given)
        with _interrupt_leaves():
            function = load(command)
        return _run(function, given, prog, command.one_writer, command.libraries)

    return guarded(call, COMMANDS[name].goes_on)


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
    if verb == "submit":
        return guarded(lambda: importlib.import_module("memfree.commands.submit").main(rest))
    if verb not in COMMANDS:
        exit_with_error(
            f"unknown command {verb!r}{did_you_mean(verb, [*COMMANDS, 'submit'])}; "
            f"commands are {', '.join(COMMANDS)}, submit"
        )
    return run_command(verb, rest, prog=f"memfree {verb}")


def load(command: Command) -> Callable[..., Any]:
    """Import a command's function."""
    module, name = command.function.split(":")
    return getattr(importlib.import_module(module), name)


@contextmanager
def _interrupt_leaves() -> Iterator[None]:
    """Let Ctrl-C end the process while libraries are imported.

    As an exception in the middle of an import it would abort torch, or be caught on its way.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return

    def leave(*_: object) -> None:
        sys.stdout.flush()
        print(INTERRUPTED, file=sys.stderr, flush=True)
        os._exit(130)

    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _overview() -> str:
    return "\n".join(
        [
            "usage: memfree COMMAND [options]",
            "",
            "Induce, measure and remove the memorization of training images in diffusion models.",
            "",
            "commands:",
            *(f"  {name:<15}  {command.help}" for name, command in COMMANDS.items()),
            f"  {'submit':<15}  submit a command as a SLURM job: memfree submit train --help",
            "",
            "scripts of a checkout:",
            *(f"  {name + '.py':<15}  the same as memfree {name}" for name in SCRIPTS),
            "",
            "memfree COMMAND --help explains the options of a command.",
            f"{DEBUG_VARIABLE}=1 shows where an error came from.",
        ]
    )


def parser_of(function: Callable[..., Any], prog: str | None) -> ArgumentParser:
    """The parser of a typed function's options, ``--config`` among them."""
    # Here, not above: a script is in the care of guarded before anything slow is imported.
    from jsonargparse import ArgumentParser, set_parsing_settings

    limit_aliases()
    set_parsing_settings(
        docstring_parse_attribute_docstrings=True,
        # Importing a module runs it: a configuration may name no class but those of the options,
        # which the parser names to itself.
        import_path_denylist=["*"],
        import_path_allowlist=["memfree"],
        instantiate_subclass_spec_in_any=False,
    )
    settings: dict[str, Any] = {
        "prog": prog,
        "description": _description(function),
        "exit_on_error": False,
        "allow_abbrev": False,
    }
    parser: ArgumentParser
    if guidance := inspect.signature(function).parameters.get("guidance"):
        from memfree.cli.mitigation_options import MitigationParser

        parser = MitigationParser(guidance.default.mitigation, **settings)
    else:
        parser = ArgumentParser(**settings)
    parser.add_argument(
        "--config", action="config", help="YAML file with options; may be given several times."
    )
    parser.add_function_arguments(function, fail_untyped=True, as_group=False)
    return parser


def _description(function: Callable[..., Any]) -> str:
    """The docstring up to its first section: the rest is the text of the options."""
    lines: list[str] = []
    for line in (inspect.getdoc(function) or "").splitlines():
        if line.strip() in ("Args:", "Returns:", "Raises:", "Yields:", "Example:", "Examples:"):
            break
        lines.append(line)
    return "\n".join(lines).strip()


def _run(
    function: Callable[..., Any],
    args: Sequence[str] | None,
    prog: str | None,
    lock: bool,
    libraries: Sequence[str] = (),
) -> Any:
    parser = parser_of(function, prog)
    words = sys.argv[1:] if args is None else list(args)
    check_config_files(words)
    check_no_further_files(words, list(parser.groups or {}))
    try:
        config = parser.parse_args(words)
    # ImportError: jsonargparse's, for a class that a configuration within another one names.
    except (argparse.ArgumentError, ImportError) as error:
        exit_with_error(option_message(str(error), parser))
    except RecursionError:
        exit_with_error("--config: a value that contains itself, or too many in each other")
    if old_names := getattr(parser, "old_names", ""):
        say(old_names, stderr=True)
    for name in parser.groups or {}:  # jsonargparse takes a list for a set of options
        if not hasattr(config.get(name), "keys"):
            exit_with_error(f"--{name}: {config.get(name)!r} is not a set of options; see --help")
    with _interrupt_leaves():
        for library in libraries:
            importlib.import_module(library)
    from memfree.folders.manifest import resolved_config
    from memfree.out_of_memory import explained_memory

    launch = launched()
    options = options_of(parser)
    batches = [f"a smaller {option}" for option in options if option.endswith("batch_size")]
    with _as_one_run(launch, config), explained_memory("running", batches):
        arguments = parser.instantiate(config)
        arguments.pop("config", None)
        if "part" in config:  # the folder is that of all parts
            config["part"] = ALL
        with resolved_config(parser.dump(config)), _writing(arguments, lock, launch):
            return function(**arguments)


def _as_one_run(launch: Launch, config: Namespace) -> AbstractContextManager[None]:
    """Take the processes of a launcher as the options --trainer.* say: one run, or one each."""
    devices, nodes = 1, config.get("trainer.num_nodes", 1)
    if launch.told and "trainer.devices" in config:
        from memfree.training.trainer import device_count, means_all_started

        given = config["trainer.devices"]
        devices = device_count(launch, config["trainer.accelerator"], given)
        if means_all_started(launch, given):
            # A run by itself forgets torchrun, after which it would mean all devices.
            config["trainer.devices"] = devices
    return as_one_run(launch, devices, nodes)


@contextmanager
def _writing(arguments: Any, lock: bool, launch: Launch) -> Iterator[None]:
    """Be the only writer of ``--out``, or of a part of it; name it where it cannot be written."""
    from memfree.folders.atomic import explained_storage
    from memfree.folders.lock import one_of_launch, one_writer

    out = arguments.get("out")
    if not isinstance(out, Path):
        yield
        return
    whole = arguments.get("part", ALL) == ALL
    with explained_storage(out), ExitStack() as stack:
        try:
            if lock:
                stack.enter_context(one_writer(out, part_of(arguments.get("part", ALL))))
            elif launch.several and whole:
                stack.enter_context(one_of_launch(out))
        except ValueError as error:
            if not launch.several:
                raise
            raise ValueError(f"{error} ({advice(launch, _can_share(arguments))})") from error
        yield


def _can_share(arguments: Any) -> str:
    """Options by which several processes do a command together."""
    if hasattr(arguments.get("trainer"), "devices"):
        return "--trainer.devices"
    return "--part" if "part" in arguments else ""
