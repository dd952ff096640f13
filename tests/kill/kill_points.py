"""Ends a process by SIGKILL at its n-th change of the file system below a folder."""

from __future__ import annotations

import builtins
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "fsync")
"""Functions of ``os`` that are watched, beside opening a file for writing."""


class KillPoints:
    """Watches a process's changes below ``root``, and kills it at one of them.

    Args:
        root: what lies elsewhere does not count.
        at: number of the change, None to watch only.
        how: ``before`` or ``after`` the change; ``torn``: before it, and of a file that was being
            flushed only the first half is there, as after a loss of power.
    """

    def __init__(self, root: Path, at: int | None, how: str) -> None:
        self.root = os.path.realpath(root) + os.sep
        self.at = at
        self.how = how
        self.events: list[tuple[str, str]] = []
        self._truncate = os.truncate

    def install(self) -> None:
        """Watch from now on, in this process only."""
        for name in CHANGES:
            setattr(os, name, self._watched(name, getattr(os, name)))
        opened = builtins.open

        def watched_open(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            if any(letter in mode for letter in "wxa+") and isinstance(file, (str, os.PathLike)):
                return self._call(
                    "open", os.fspath(file), lambda: opened(file, mode, *rest, **named)
                )
            return opened(file, mode, *rest, **named)

        builtins.open = watched_open
        io.open = watched_open  # pathlib's
        low = os.open

        def watched_low(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            if flags & os.O_CREAT:
                name = _place(path, named.get("dir_fd"))
                return self._call("open", name, lambda: low(path, flags, *rest, **named))
            return low(path, flags, *rest, **named)

        os.open = watched_low

    def _watched(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *rest: Any, **named: Any) -> Any:
            # A rename is of its target.
            about = rest[0] if name in ("replace", "rename") else first
            path = _place(about, named.get("dir_fd"))
            return self._call(name, path, lambda: original(first, *rest, **named))

        return call

    def _call(self, name: str, path: str, change: Callable[[], Any]) -> Any:
        path = os.path.abspath(path)
        if not path.startswith(self.root):
            return change()
        here = self.at == len(self.events)
        self.events.append((name, path[len(self.root) :]))
        if here and self.how != "after":
            if self.how == "torn" and os.path.isfile(path):
                self._truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return change()
        finally:  # also of a change that fails, as of a file that is not there
            if here:
                os.kill(os.getpid(), signal.SIGKILL)


def _place(path: Any, folder: int | None) -> str:
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    name = os.fsdecode(path)
    return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name) if folder else name


def save(events: list[tuple[str, str]], path: Path) -> None:
    """Write a list of changes as JSON."""
    path.write_text(json.dumps(events), encoding="utf-8")
