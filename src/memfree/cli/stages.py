"""Chains of commands: each printed as a user would type it, then run in this process."""

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
    """One command of a chain; running it again when it is finished does nothing, or the same."""

    command: str
    """A verb of ``memfree``."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options by name, without the dashes; a list or tuple is written in brackets."""

    def arguments(self) -> list[str]:
        """The options as words of a command line."""
        return [f"--{name}={_word(value)}" for name, value in self.options.items()]

    def words(self) -> list[str]:
        """The program and its options, as ``sys.argv`` has them."""
        script = [f"{self.command}.py"] if self.command in SCRIPTS else ["memfree", self.command]
        return [*script, *self.arguments()]

    def line(self) -> str:
        """The command as a user would type it."""
        return shlex.join((["python"] if self.command in SCRIPTS else []) + self.words())

    def check(self) -> None:
        """Parse the options as the command itself will, and do nothing; no folder need exist yet.

        Raises:
            ValueError: an option is unknown or has a wrong value; the message ends with the line.
        """
        try:
            parsed(_parser(self.command), self.arguments())
        except ValueError as error:
            message = " ".join(str(error).removesuffix("; see --help").split())
            raise ValueError(f"{message} (in: {self.line()})") from error

    def run(self) -> Any:
        """Run it in this process; a failure ends the process with the command's own one line.

        Returns what the command returns: for some an exit status, which is no failure of a chain.
        """
        before = sys.argv
        sys.argv = self.words()  # manifests and reports name this command, not the whole chain
        try:
            return run_command(self.command, self.arguments(), prog=self.line().split(" --")[0])
        finally:
            sys.argv = before


def run_stages(stages: list[Stage], console: Console) -> float:
    """Run a chain, one after another; the seconds it took."""
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


@functools.cache  # a study asks for the same one hundreds of times
def _parser(command: str) -> ArgumentParser:
    return parser_of(load(COMMANDS[command]), None)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_word(item) for item in value) + "]"
    return str(value)
