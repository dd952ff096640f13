"""Chains of commands: each is printed as a user would type it, then run in this process."""

from __future__ import annotations

import functools
import shlex
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from memfree.cli.entry import COMMANDS, SCRIPTS, load, parsed, parser_of, run_command

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


@dataclass(frozen=True)
class Stage:
    """A command of a chain; running it again once it is finished changes nothing."""

    command: str
    """A verb of ``memfree``."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options by name without dashes; a list or tuple is written in brackets."""

    def arguments(self) -> list[str]:
        """The options as command-line words."""
        return [f"--{name}={_word(value)}" for name, value in self.options.items()]

    def words(self) -> list[str]:
        """The program and its options, as in ``sys.argv``."""
        script = [f"{self.command}.py"] if self.command in SCRIPTS else ["memfree", self.command]
        return [*script, *self.arguments()]

    def line(self) -> str:
        """The command as a user would type it."""
        return shlex.join((["python"] if self.command in SCRIPTS else []) + self.words())

    def check(self) -> None:
        """Parse the options as the command will, and nothing else; a ValueError shows the line."""
        try:
            parsed(_parser(self.command), self.arguments())
        except ValueError as error:
            message = " ".join(str(error).removesuffix("; see --help").split())
            raise ValueError(f"{message} (in: {self.line()})") from error

    def run(self) -> Any:
        """Run it in this process and return its result; a failure ends the process with one line.

        The result may be an exit status, which does not fail a chain.
        """
        before = sys.argv
        sys.argv = self.words()  # manifests and reports name this command, not the chain
        try:
            return run_command(self.command, self.arguments(), prog=self.line().split(" --")[0])
        finally:
            sys.argv = before


def run_stages(stages: list[Stage], console: Console) -> float:
    """Run a chain in order; returns the seconds it took."""
    begin = time.perf_counter()
    for number, stage in enumerate(stages, 1):
        console.rule(
            Text(f"{number} of {len(stages)}: {stage.command}", style="bold"), align="left"
        )
        line = Text(f"$ {stage.line()}", style="dim")
        console.print(line, soft_wrap=True)
        start = time.perf_counter()
        stage.run()
        console.print(f"{time.perf_counter() - start:.1f} s", style="dim")
    return time.perf_counter() - begin


@functools.cache  # a study needs the same one hundreds of times
def _parser(command: str) -> ArgumentParser:
    return parser_of(load(COMMANDS[command]), None)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_word(item) for item in value) + "]"
    return str(value)
