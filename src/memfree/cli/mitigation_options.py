"""``--mitigation NAME`` and ``--mitigation.OPTION``: only the options of the chosen mitigation.

They become fields of ``GuidanceSettings``, the record of all mitigations' options, and are saved
under their own names. Old names, such as ``--guidance.wen.target``, work for one release.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, get_loader

from memfree.cli.errors import did_you_mean
from memfree.guidance.options import MITIGATIONS, MitigationOptions, is_import_path, record_paths
from memfree.guidance.settings import GuidanceSettings

PARAMETER = "guidance"
"""The parameter of commands that takes ``GuidanceSettings``."""
_NAME, _OLD_NAME = "mitigation.name", f"{PARAMETER}.mitigation"
_OPTION = re.compile(rf"--(config|allow_code|(mitigation|{PARAMETER})(\.[\w.]+)?)")
_RUNS_CODE = "runs the code that it names: allow it by --allow_code true on the command line"


class _Given(NamedTuple):
    """A word of a command line, guidance options, or an option file with some."""

    word: str = ""
    options: dict[str, Any] = {}
    """Guidance options by dotted name: ``mitigation.name``, ``guidance.c1``."""
    others: dict[str, Any] | None = None
    """The other options of an option file."""


class MitigationParser(ArgumentParser):
    """Parser of a function with ``GuidanceSettings``; ``default`` is that of ``--mitigation``."""

    new_options = ("--mitigation", "--allow_code")
    """Options without an action in the parser, for messages."""
    old_names = ""
    """A line about the old names used in the last parse; may be empty."""

    def __init__(self, default: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.default = default

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """Parse words, among them the options of the mitigation that they choose."""
        try:
            given = list(_given(sys.argv[1:] if args is None else args))
            chosen = _chosen(given)
            name = chosen or self.default
            _check_name(name, given)
            words = [word for one in given for word in _words(one, name)]
        except ValueError as error:
            raise argparse.ArgumentError(None, str(error)) from error
        if {"-h", "--help"} & set(words):
            (self._of_mitigation(chosen) if chosen else self._overview()).print_help()
            self.exit()
        self.old_names = _old_names(given, name)
        try:
            return super().parse_args(words, *rest, **kwargs)
        except argparse.ArgumentError as error:
            new = {f'"{PARAMETER}.{path}"': f'"{now}"' for path, now in _new_names(name).items()}
            message = re.sub(r'"[\w.]+"', lambda key: new.get(key[0], key[0]), str(error))
            raise argparse.ArgumentError(None, message) from error

    def dump(self, cfg: Namespace, *args: Any, **kwargs: Any) -> str:
        """Write options as YAML, those of the chosen mitigation under ``mitigation``."""
        options = yaml.safe_load(super().dump(cfg, *args, **kwargs))
        record = _flat(options.pop(PARAMETER, {}))
        paths = record_paths(cfg[_OLD_NAME])
        own = {"mitigation": "name", **{path: option for option, path in paths.items()}}
        options["mitigation"] = {own[path]: record[path] for path in own if path in record}
        for path, value in record.items():
            # Of another mitigation: without effect, but part of the samples' identity.
            if path not in own and value != _default(path):
                options[f"{PARAMETER}.{path}"] = value
        return yaml.safe_dump(options, sort_keys=False, allow_unicode=True)

    def _of_mitigation(self, name: str) -> ArgumentParser:
        parser = ArgumentParser(prog=f"{self.prog} --mitigation {name}", usage="%(prog)s [options]")
        entry = MITIGATIONS.get(name)
        parser.description = entry.summary if entry else "a mitigation of your own"
        if entry and entry.options is not MitigationOptions:
            _add_options(parser.add_argument_group(f"options of {name}"), entry.options, own=True)
        _add_options(parser.add_argument_group("options of every mitigation"), MitigationOptions)
        return parser

    def _overview(self) -> ArgumentParser:
        """This parser with only the options common to all mitigations, for ``--help``."""
        for name, group in (self.groups or {}).items():
            if name.split(".")[0] == PARAMETER:
                group.title = group.description = None
        for action in self._actions:
            if action.dest.split(".")[0] == PARAMETER:
                action.help = argparse.SUPPRESS
        self.formatter_class = _Lines
        needed = [action for action in self._actions if action.required]
        required = [f"{action.option_strings[0]} {action.dest.upper()}" for action in needed]
        self.usage = " ".join([self.prog, *required, "[options]"])
        self.description = textwrap.fill(" ".join((self.description or "").split()), 78)
        lines = [f"  {name:<15} {entry.summary}" for name, entry in MITIGATIONS.items()]
        group = self.add_argument_group(
            "mitigation",
            "\n".join(
                ["NAME is one of these; --mitigation NAME --help shows its options.", *lines]
            ),
        )
        own = "Or the import path of a memfree.guidance.Mitigation of your own."
        group.add_argument("--mitigation", default=self.default, metavar="NAME", help=own)
        allow = "Allow the code of an import path to run."
        group.add_argument("--allow_code", type=bool, default=False, help=allow)
        _add_options(group, MitigationOptions)
        return self


class _Lines(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions."""


def _add_options(group: Any, options: type, own: bool = False) -> None:
    """Add a dataclass's fields with their docs; ``own``: not those that every mitigation has."""
    shared = {one.name for one in fields(MitigationOptions)} if own else set()
    described = [docstring_parser.parse_from_object(kind) for kind in options.__mro__[:-1]]
    texts = {one.arg_name: one.description for docs in described for one in docs.params}
    types = get_type_hints(options)
    for one in fields(options):
        if (name := one.name) not in shared:
            kind, text = types[name], texts[name]
            group.add_argument(f"--mitigation.{name}", type=kind, default=one.default, help=text)


def _given(words: Sequence[str]) -> Iterator[_Given]:
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if not _OPTION.fullmatch(option) or not (equals or (value := next(rest, ""))):
            yield _Given(word)
        elif option == "--config":
            yield _option_file(value)
        else:
            name = option.removeprefix("--")
            # A whole set of options, as --guidance.wen '{target: 3}'.
            whole = value.lstrip().startswith("{")
            yield _Given(options=_about({name: get_loader("yaml")(value) if whole else value}))


def _option_file(name: str) -> _Given:
    """Read an option file or its text; one without guidance options is left to the parser."""
    path, text = Path(name), name
    try:
        if "\n" not in name and not name.lstrip().startswith("{") and path.exists():
            text = path.read_text(encoding="utf-8")
        options = get_loader("yaml")(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return _Given(f"--config={name}")
    if about := _about(options) if isinstance(options, dict) else {}:
        others = {key: value for key, value in options.items() if not _is_about(key)}
        return _Given(options=about, others=others)
    is_pipe = text is not name and not path.is_file()
    return _Given(f"--config={text if is_pipe else name}")  # a pipe can be read once


def _is_about(key: Any) -> bool:
    return str(key).split(".")[0] in ("mitigation", PARAMETER, "allow_code")


def _about(options: Mapping[Any, Any]) -> dict[str, Any]:
    about = _flat({str(key): value for key, value in options.items() if _is_about(key)})
    if "mitigation" in about:
        about[_NAME] = about.pop("mitigation")
    return about


def _flat(options: Any, name: str = "") -> dict[str, Any]:
    """Nested options by dotted name."""
    if not isinstance(options, dict):
        return {name: options}
    parts = [_flat(value, f"{name}.{key}".lstrip(".")) for key, value in options.items()]
    return {key: value for part in parts for key, value in part.items()}


def _chosen(given: Sequence[_Given]) -> str:
    """The mitigation named last; empty where there is none."""
    names = [one.options[key] for one in given for key in (_OLD_NAME, _NAME) if key in one.options]
    return str(names[-1]) if names else ""


def _check_name(name: str, given: Sequence[_Given]) -> None:
    """Refuse an unknown mitigation, or one whose code the user has not allowed to run."""
    allowed = ""
    for one in given:
        if "allow_code" in one.options:
            allowed = str(one.options["allow_code"]).lower()
            if one.others is not None:
                raise ValueError(f"--config: allow_code is no option of files, it {_RUNS_CODE}")
    if allowed not in ("", "true", "false"):
        raise ValueError(f"--allow_code: expected true or false, got {allowed!r}")
    if name in MITIGATIONS:
        return
    if not is_import_path(name):
        near = did_you_mean(name, [*MITIGATIONS])
        raise ValueError(
            f"--mitigation: expected one of {', '.join(MITIGATIONS)}, got {name}{near}"
        )
    if allowed != "true":
        raise ValueError(f"--mitigation {name} {_RUNS_CODE}")


def _words(one: _Given, name: str) -> list[str]:
    if one.word:
        return [one.word]
    # A file's options belong to the mitigation that it names.
    name = str(one.options.get(_NAME, name))
    record = {
        f"{PARAMETER}.{_path(option, name)}" if option.startswith("mitigation.") else option: value
        for option, value in one.options.items()
        if option != "allow_code"
    }
    if one.others is None:
        return [f"--{option}={value}" for option, value in record.items()]
    return ["--config=" + yaml.safe_dump({**one.others, **record}, sort_keys=False)]


def _path(option: str, name: str) -> str:
    """The field of the record that ``mitigation.OPTION`` stands for; refuses an unknown one."""
    paths, own = record_paths(name), option.removeprefix("mitigation.")
    if option == _NAME:
        return "mitigation"
    if own in paths:
        return paths[own]
    others = [other for other in MITIGATIONS if own in record_paths(other)]
    near = did_you_mean(f"--{option}", [f"--mitigation.{known}" for known in paths])
    hint = f" (it is an option of {', '.join(others)})" if others else near
    raise ValueError(f"unknown option --{option} of --mitigation {name}{hint}")


def _new_names(name: str) -> dict[str, str]:
    """Maps fields of the record to options of the chosen mitigation."""
    own = {path: f"mitigation.{option}" for option, path in record_paths(name).items()}
    return {"mitigation": "mitigation", **own}


def _old_names(given: Sequence[_Given], name: str) -> str:
    """A line that names the new options for old ones; may be empty."""
    used = [
        (option.partition(".")[2], value)
        for one in given
        for option, value in one.options.items()
        if option.startswith(f"{PARAMETER}.")
    ]
    # Only what is not the default, for a whole run's record.
    changed = [path for path, value in used if value != _default(path)]
    old = list(dict.fromkeys(changed or [path for path, _ in used]))
    if not old:
        return ""
    new = _new_names(name)
    for other in MITIGATIONS:
        for option, path in record_paths(other).items():
            new.setdefault(path, f"mitigation.{option} of --mitigation {other}")
    pairs = [f"--{PARAMETER}.{path} is now --{new.get(path, 'mitigation')}" for path in old]
    more = f" ({len(pairs) - 4} more)" if len(pairs) > 4 else ""
    return f"memfree: {', '.join(pairs[:4])}{more}; old names end with the next release"


def _default(path: str) -> Any:
    value: Any = GuidanceSettings()
    for name in path.split("."):
        value = getattr(value, name, None)
    return value
