"""The resolved configuration of the command that is running, saved beside its result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from memfree.first_process import is_first_process
from memfree.folders.atomic_files import write_text

CONFIG_NAME = "config.yaml"

_resolved: ContextVar[str | None] = ContextVar("resolved", default=None)


@contextmanager
def resolved_config(text: str) -> Iterator[None]:
    """Make ``text`` (YAML) the configuration that ``save_config`` writes inside this context."""
    token = _resolved.set(text)
    try:
        yield
    finally:
        _resolved.reset(token)


def save_config(folder: Path) -> None:
    """Write ``folder/config.yaml``, which replays the running command with ``--config``.

    A function called from a command line calls this once it has accepted ``folder`` as its own and
    makes something there, never where that is finished already; called from Python it writes
    nothing. Under several processes only the first writes.
    """
    text = _resolved.get()
    if text is None or not is_first_process():
        return
    write_text(folder / CONFIG_NAME, text)
