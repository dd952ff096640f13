"""Temporary files and folders that no other process takes for its own or for abandoned."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

RANDOM = "[0-9a-f]{24}"
"""The part of a name that tells the machine and is random. It has no dot, so that no name for ``x``
is one for ``x.v2``."""
_TEMPORARY = re.compile(rf"\..+\.({RANDOM}|\d+)\.tmp")
"""Names of ``new_file``; earlier versions had the number of the process."""
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)


@contextmanager
def new_file(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """An empty hidden file beside ``path``, made here and locked; removed at the end if it is left.

    Args:
        path: what it is to become.
        mode: its permissions, less those that the umask takes away.

    Raises:
        OSError: it cannot be made.
    """
    temporary = _random_name(path, "tmp")
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NOFOLLOW, mode)
    try:
        if not _lock(handle):  # Windows renames no open file
            os.close(handle)
            handle = -1
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        if handle >= 0:
            os.close(handle)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty hidden folder beside ``path``, made here and locked; the caller removes it.

    Raises:
        OSError: it cannot be made.
    """
    while True:
        folder = _random_name(path, "partial")
        folder.mkdir()
        with held(folder) as is_there:
            # Somebody who clears up may have found it before it was locked.
            if is_there:
                yield folder
                return


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Keep others from clearing a folder up; whether it is there. Without locks nothing is kept."""
    try:
        handle = os.open(folder, os.O_RDONLY | _NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        yield False
        return
    except PermissionError:  # Windows opens no folders
        yield True
        return
    try:
        _lock(handle)
        there = False
        with contextlib.suppress(OSError):
            there = os.path.samestat(os.fstat(handle), folder.stat())
        yield there
    finally:
        os.close(handle)


def is_held(path: Path) -> bool | None:
    """Whether a process that made a temporary file or folder still runs; None: it is not known."""
    if fcntl is None:
        return None
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | _NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(handle)
    return False


def remove_temporary(*folders: Path, pattern: str = ".*.tmp") -> None:
    """Remove what killed processes left of ``new_file`` in these folders, and not below them.

    Args:
        folders: folders of the running command alone; they need not exist.
        pattern: which names, as a glob.
    """
    for folder in folders:
        for path in folder.glob(pattern):
            if not _TEMPORARY.fullmatch(path.name) or is_held(path):
                continue
            with contextlib.suppress(OSError):
                if stat.S_ISREG(path.lstat().st_mode):
                    path.unlink()


def is_of_this_machine(name: str) -> bool:
    """Whether a random part comes from here: locks of some file systems hold on one machine."""
    return name.startswith(_machine())


def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _random_name(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{_machine()}{secrets.token_hex(8)}.{suffix}")


def _lock(handle: int) -> bool:
    """Lock an open file or folder of our own; whether that is possible here."""
    if fcntl is None:
        return False
    with contextlib.suppress(OSError):  # no locks here: see ``is_held``
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True
