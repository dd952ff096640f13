"""Terminal output: plain console, progress bars, quiet libraries, plurals."""

from __future__ import annotations

import logging
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from rich.console import Console


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """``1 image``, ``2 images``: a number and what it counts; most nouns take an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {plural or noun + 's'}"


SRUN_UNUSED = "The .srun. command is available.*"
"""What Lightning says wherever SLURM is installed and not used."""


@contextmanager
def quiet(*patterns: str) -> Iterator[None]:
    """Silence Lightning's information lines, and warnings that match any of the patterns."""
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


def counting_bar(console: Console, *columns: ProgressColumn) -> Progress:
    """A bar for each task: its description, how many of how many, the time left, more columns."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        *columns,
        console=console,
    )


_HIDDEN = {"Cc", "Cs", "Zl", "Zp"}  # control characters, halves of characters, ends of lines
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn the direction of the text behind them."""


def shown(text: str, encoding: str = "utf-8", keep: str = "") -> str:
    r"""Text as a terminal may show it: nothing in it moves the cursor or hides other text.

    Args:
        text: untrusted, such as a file's name. Spaces, joiners and letters of any kind stay.
        encoding: of the stream; what it cannot show is written as ``\u03c3`` as well.
        keep: control characters that stay.
    """
    if not (text.isascii() and text.isprintable()):
        text = "".join(
            _escaped(one) if one not in keep and _is_active(one) else one for one in text
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
    """Print one line with untrusted names in it.

    Args:
        line: what to say.
        stderr: write to standard error.
    """
    stream = sys.stderr if stderr else sys.stdout
    print(shown(line, getattr(stream, "encoding", None) or "utf-8"), file=stream)


def plain_console(stderr: bool = False, **options: Any) -> Console:
    """A console that shows text as it is: ``[bold]`` is no style and ``:cat:`` no picture.

    Whatever is printed on it passes ``shown``; rich's ``Text`` in a table should do so before,
    since its width is measured.

    Args:
        stderr: write to standard error.
        options: further ones of rich's ``Console``.
    """
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment
    from rich.text import Text

    class PlainConsole(Console):
        def render_str(self, text: str, **given: Any) -> Text:  # type: ignore[override]
            return super().render_str(shown(text, self.encoding, keep="\n\t"), **given)

        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                if segment.control or segment.text.isascii() and segment.text.isprintable():
                    yield segment
                else:
                    text = shown(segment.text, self.encoding, keep="\n")
                    yield Segment(text, segment.style)

    return PlainConsole(stderr=stderr, markup=False, emoji=False, **options)
