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
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from memfree import __version__
from memfree.cli.errors import (
    DEBUG_VARIABLE,
    INTERRUPTED,
    exit_with_error,
    guarded,
    option_message,
    options_of,
    unknown_command,
)
from memfree.console import say
from memfree.folders.lock import ALL, part_of
from memfree.folders.untrusted import (
    check_config_files,
    check_no_further_files,
    config_files,
    limit_aliases,
    load_yaml,
)
from memfree.slurm.launcher import Launch, advice, as_one_run, launched

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def as_options(words: Sequence[str], option: str | None) -> list[str]:
    """Turn the free word of a command, its first or last, into ``option``, put first so that an
    explicit option wins; a last word is not free after an option that waits for a value."""
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
"""Options of a text-to-image study's plan that a grid does not have."""


def command_of(name: str, words: Sequence[str]) -> Command:
    """The command of a verb; a text-to-image plan of ``study`` has options of its own."""
    if name not in ("study", "text-study"):
        return COMMANDS[name]
    check_config_files(words)
    keys = {re.split(r"[=.+]", word.removeprefix("--"))[0] for word in words if word[:2] == "--"}
    for file in config_files(words):
        with suppress(OSError, ValueError):  # the parser says why
            options = load_yaml(Path(file).read_text(encoding="utf-8"))
            keys.update(map(str, options) if isinstance(options, dict) else ())
    text = (name == "text-study" or keys & TEXT_PLAN) and "grids" not in keys
    return COMMANDS["text-study" if text else "study"]


class Command(NamedTuple):
    """A command: where its function is, imported only when it is called."""

    function: str
    help: str
    positional: str | None = None
    one_writer: bool = True
    """Whether it locks the folder of its --out; a study's commands lock their own."""
    goes_on: bool = True
    """Whether a stopped run resumes; others start over."""
    libraries: tuple[str, ...] = ("torch", "lightning.pytorch", "diffusers")
    """Slow imports, made once its options are known to be right."""


def _command(verb: str, text: str, place: str = "", **options: Any) -> tuple[str, Command]:
    name = verb.replace("-", "_")
    return verb, Command(f"memfree.commands.{place or f'{name}:{name}'}", text, **options)


_AGAIN: dict[str, Any] = {"goes_on": False}
_TORCH: dict[str, Any] = {"libraries": ("torch",)}
_STUDY: dict[str, Any] = {"positional": "config", "one_writer": False, "libraries": ()}
COMMANDS = dict(
    [
        _command("prepare", "turn a source into a dataset folder of shards", **_AGAIN, **_TORCH),
        _command("train", "train a model on a dataset folder"),
        _command("scratch", "build a small text-to-image model from nothing"),
        _command("train-embedding", "train a small copy-detection embedding", **_AGAIN),
        _command("train-clip", "train a small CLIP on captions", **_AGAIN),
        _command("index", "build and calibrate a reference index"),
        _command("sample", "draw samples from a trained model", "sample:predict"),
        _command("evaluate", "measure memorization and quality", **_AGAIN),
        _command("report", "write the HTML page of an evaluation", **_AGAIN, **_TORCH),
        _command("audit", "find copies among images from anywhere", positional="images", **_AGAIN),
        _command("tune", "find the smallest strengths that leave no copy", **_AGAIN),
        _command("study", "run a plan of many configurations and tabulate it", **_STUDY),
        _command(
            "text-study",
            "the former name of study for plans of text-to-image models",
            "study:text_study",
            **_STUDY,
        ),
        _command("demo", "induce, measure and remove memorization on digits", libraries=()),
    ]
)

SCRIPTS = ("train", "sample")
"""Commands that a checkout also has as scripts: ``python train.py`` is ``memfree train``."""


def run(
    function: Callable[..., Any],
    args: Sequence[str] | None = None,
    prog: str | None = None,
    one_writer: bool = True,
) -> Any:
    """Call a typed function with arguments from the command line and from YAML files.

    Every parameter is an option; dataclass fields are options below it (``--data.batch_size``).
    ``--config FILE`` reads YAML, several files layer, and the later word on the line wins. The
    function saves its resolved configuration (``memfree.folders.manifest.save_config``).

    Args:
        function: annotated; its docstring and those of its dataclasses are the text of ``--help``.
        args: the command line without the program's name, None for ``sys.argv[1:]``.
        prog: the name in the usage line, None for the script's.
        one_writer: lock the folder of an option ``--out`` meanwhile (``memfree.folders.lock``).

    Raises:
        SystemExit: status 2 and one line on stderr for a wrong option, the function's ValueError
            or OSError, or too little memory; 130 after Ctrl-C. MEMFREE_DEBUG=1 adds a traceback.
    """
    return guarded(lambda: _run(function, args, prog, one_writer))


def run_command(name: str, args: Sequence[str] | None = None, prog: str | None = None) -> Any:
    """``run`` a command's function and import its libraries once its options are right."""
    given = as_options(sys.argv[1:] if args is None else args, COMMANDS[name].positional)
    if name == "text-study":
        print("memfree: text-study is now memfree study PLAN.yaml", file=sys.stderr)

    def call() -> Any:
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
        exit_with_error(unknown_command(verb, [*COMMANDS, "submit"]))
    return run_command(verb, rest, prog=f"memfree {verb}")


def load(command: Command) -> Callable[..., Any]:
    """Import a command's function."""
    module, name = command.function.split(":")
    return getattr(importlib.import_module(module), name)


@contextmanager
def _interrupt_leaves() -> Iterator[None]:
    """Let Ctrl-C end the process during imports: an exception there aborts torch or gets caught."""
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
    commands = "\n".join(f"  {name:<15}  {command.help}" for name, command in COMMANDS.items())
    scripts = "\n".join(f"  {name + '.py':<15}  the same as memfree {name}" for name in SCRIPTS)
    return f"""usage: memfree COMMAND [options]

Induce, measure and remove the memorization of training images in diffusion models.

commands:
{commands}
  submit           submit a command as a SLURM job: memfree submit train --help

scripts of a checkout:
{scripts}

memfree COMMAND --help explains the options of a command.
{DEBUG_VARIABLE}=1 shows where an error came from."""


_SECTIONS = re.compile(r"^\s*(?:Args|Returns|Raises|Yields|Examples?):\s*$", re.MULTILINE)


def parser_of(function: Callable[..., Any], prog: str | None) -> ArgumentParser:
    """The parser of a typed function's options, ``--config`` among them."""
    # Imported here: ``guarded`` must already run when anything slow is imported.
    from jsonargparse import ArgumentParser, set_parsing_settings

    limit_aliases()
    set_parsing_settings(
        docstring_parse_attribute_docstrings=True,
        # Importing a module runs it, so a configuration may name only the classes of the options.
        import_path_denylist=["*"],
        import_path_allowlist=["memfree"],
        instantiate_subclass_spec_in_any=False,
    )
    settings: dict[str, Any] = {
        "prog": prog,
        # Up to its first section: the rest documents the options.
        "description": re.split(_SECTIONS, inspect.getdoc(function) or "", maxsplit=1)[0].strip(),
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


def parsed(parser: ArgumentParser, words: Sequence[str], defaults: bool = True) -> Namespace:
    """The options that a command line gives; a ValueError names what is wrong."""
    check_config_files(words)
    check_no_further_files(words, list(parser.groups or {}))
    try:
        config = parser.parse_args(list(words), defaults=defaults)
    # ImportError: jsonargparse's, for a class named in a nested configuration.
    except (argparse.ArgumentError, ImportError) as error:
        raise ValueError(option_message(str(error), parser)) from error
    except RecursionError:
        raise ValueError(
            "--config: values that contain themselves, or too many in each other"
        ) from None
    for name in parser.groups or {}:  # jsonargparse takes a list for a set of options
        if name in config and not hasattr(config[name], "keys"):
            raise ValueError(f"--{name}: {config[name]!r} is not a set of options; see --help")
    return config


def _run(
    function: Callable[..., Any],
    args: Sequence[str] | None,
    prog: str | None,
    lock: bool,
    libraries: Sequence[str] = (),
) -> Any:
    parser = parser_of(function, prog)
    config = parsed(parser, sys.argv[1:] if args is None else args)
    if old_names := getattr(parser, "old_names", ""):
        say(old_names, stderr=True)
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
        if "part" in config:  # all parts share the folder
            config["part"] = ALL
        with resolved_config(parser.dump(config)), _writing(arguments, lock, launch):
            return function(**arguments)


def _as_one_run(launch: Launch, config: Namespace) -> AbstractContextManager[None]:
    """Treat a launcher's processes as --trainer.* says: as one run, or as one run each."""
    devices, nodes = 1, config.get("trainer.num_nodes", 1)
    if launch.told and "trainer.devices" in config:
        from memfree.training.trainer import device_count, means_all_started

        given = config["trainer.devices"]
        devices = device_count(launch, config["trainer.accelerator"], given)
        if means_all_started(launch, given):
            # A separate run forgets torchrun, and auto would then mean all devices.
            config["trainer.devices"] = devices
    return as_one_run(launch, devices, nodes)


@contextmanager
def _writing(arguments: Any, lock: bool, launch: Launch) -> Iterator[None]:
    """Be the only writer of ``--out`` or of a part of it; name it where it cannot be written."""
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
            shared_by = "--part" if "part" in arguments else ""
            if hasattr(arguments.get("trainer"), "devices"):
                shared_by = "--trainer.devices"
            raise ValueError(f"{error} ({advice(launch, shared_by)})") from error
        yield
