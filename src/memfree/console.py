"""Terminal output: plain console, progress bars, quiet libraries, plurals."""

from __future__ import annotations

import logging
import sys
import time
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """``1 image``, ``2 images``: a number and what it counts."""
    return f"{number} {noun}" if number == 1 else f"{number} {plural or noun + 's'}"


SRUN_UNUSED = "The .srun. command is available.*"
"""Lightning's warning if SLURM is installed but unused."""


@contextmanager
def quiet(*patterns: str) -> Iterator[None]:
    """Silence Lightning's information lines and warnings that match any of the patterns."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for pattern in (".*LeafSpec.*", SRUN_UNUSED, *patterns):
            warnings.filterwarnings("ignore", pattern)
        try:
            yield
        finally:
            log.setLevel(level)


def counting_bar(console: Console, *columns: ProgressColumn, **options: Any) -> Progress:
    """Progress bars with description, n of N, time left and more columns."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        *columns,
        console=console,
        **options,
    )


PLAIN_INTERVAL = 10.0  # seconds between lines of ``ProgressLine`` outside a terminal


class ProgressLine:
    """Progress of one task: a bar named ``doing`` in a terminal, elsewhere an occasional ``line``.

    ``line``, such as "step {} of {}", takes the number done and the total, which may be unknown.
    """

    def __init__(
        self, console: Console, doing: str, line: str, total: int | None, done: int = 0
    ) -> None:
        self._console, self.total = console, total
        self._line = line if total is not None else line.split(" of")[0]
        self._last = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            text = TextColumn("{task.fields[text]}")
            # Each refresh interrupts the work.
            self._bar = counting_bar(console, text, refresh_per_second=2)
            self._bar.add_task(doing, total=total, completed=done, text="")
            self._bar.start()

    def show(self, done: int, text: str, now: bool = False) -> None:
        """Move the bar, or print a line if due or ``now``."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, text=text)
        elif now or time.monotonic() - self._last >= PLAIN_INTERVAL:
            self._last = time.monotonic()
            line = self._line.format(done, self.total)
            self._console.print(f"{line}, {text}" if text else line)

    def close(self) -> None:
        """Close the bar, so that further output starts on a new line."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


_HIDDEN = {"Cc", "Cs", "Zl", "Zp"}  # control characters, halves of characters, ends of lines
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction of the following text."""


def shown(text: str, encoding: str = "utf-8", keep: str = "") -> str:
    r"""Make untrusted text safe for a terminal: nothing moves the cursor or hides other text.

    Spaces, joiners, all letters and ``keep`` stay; what ``encoding`` lacks becomes ``\u03c3``.
    """
    if not (text.isascii() and text.isprintable()):
        text = "".join(
            _escaped(char) if char not in keep and _is_active(char) else char for char in text
        )
    try:
        return text.encode(encoding, "backslashreplace").decode(encoding)
    except (LookupError, UnicodeError):  # an encoding that Python does not know
        return text.encode("ascii", "backslashreplace").decode("ascii")


def _is_active(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN or character in _TURNING


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def say(line: str, stderr: bool = False) -> None:
    """Print one line that may contain untrusted names."""
    stream = sys.stderr if stderr else sys.stdout
    print(shown(line, getattr(stream, "encoding", None) or "utf-8"), file=stream)


class _PlainConsole(Console):
    def render_str(self, text: str, **given: Any) -> Text:  # type: ignore[override]
        return super().render_str(shown(text, self.encoding, keep="\n\t"), **given)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isascii() and segment.text.isprintable():
                yield segment
            else:
                yield Segment(shown(segment.text, self.encoding, keep="\n"), segment.style)


def plain_console(stderr: bool = False, **options: Any) -> Console:
    """A console without markup: ``[bold]`` is not a style, nor ``:cat:`` a picture.

    Output passes through ``shown``; rich's ``Text`` in a table should do so first, for its width.
    """
    return _PlainConsole(stderr=stderr, markup=False, emoji=False, **options)
