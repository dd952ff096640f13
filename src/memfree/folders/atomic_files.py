"""Files that appear whole or not at all, and are on the disk when they do."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memfree.folders.temporary import new_file


def write_atomic(path: Path, write: Callable[[Path], None], mode: int = 0o666) -> None:
    """Call ``write`` on a temporary name beside ``path``, flush it to disk, then rename it.

    Whatever happens, ``path`` holds the old content or the new, whole; after the call the new one
    survives a loss of power, and so do the folders that had to be made for it.

    Args:
        path: the file.
        write: fills the file of the name that it is given, which exists and is empty.
        mode: permissions of the file, less those that the umask takes away.
    """
    _make_folder(path.parent)
    with new_file(path, mode) as temporary:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)


def _make_folder(folder: Path) -> None:
    """Make a folder and those that it is in, and flush their names."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to the disk."""
    try:
        opened = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():  # Windows opens no folders
            return
        raise
    try:
        os.fsync(opened)
    except OSError as error:
        # Some network file systems flush no folders.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN and infinities are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(path, write)
