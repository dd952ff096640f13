"""Files below a folder, with links followed and nothing passed over in silence."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from memfree.data.names import is_hidden
from memfree.data.skipped import LeftOut, Skipped
from memfree.untrusted import short


def files_below(
    folder: Path, left_out: LeftOut, skipped: Skipped | None = None, hidden: bool = False
) -> list[Path]:
    """Everything below a folder but folders, sorted; links are followed, into folders too.

    Broken links and special files are in the list as well: :func:`problem_with_file` tells.

    Args:
        folder: where to look.
        left_out: takes hidden files and folders, links that lead back to a folder they are in,
            and empty folders.
        skipped: takes folders that cannot be listed, instead of an error.
        hidden: hidden files and folders are in the list too.

    Raises:
        OSError: a folder cannot be listed.
    """
    note = left_out.at(str(folder))
    files: list[Path] = []
    waiting: list[tuple[Path, str, tuple[tuple[int, int], ...]]] = [(folder, "", ())]
    while waiting:
        place, relative, within = waiting.pop()
        try:
            found = os.stat(place)
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            if skipped is None:
                raise
            skipped.record(f"{place}: {error.strerror or error}")
            continue
        identity = (found.st_dev, found.st_ino)
        if identity in within:
            note(f"{relative}: a link back to a folder that it is in")
            continue
        if not entries and relative:
            note(f"{relative}/: an empty folder")
        for entry in entries:
            name = f"{relative}/{entry.name}" if relative else entry.name
            if is_hidden(entry.name) and not hidden:
                note(f"{name}{'/' if _is_folder(entry) else ''}: hidden")
            elif _is_folder(entry):
                waiting.append((Path(entry.path), name, (*within, identity)))
            else:
                files.append(Path(entry.path))
    return sorted(files)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle of links
        return False


def problem_with_file(file: Path) -> str | None:
    """Why a path is no file that can be read from front to end, None where it is one."""
    try:
        mode = os.stat(file).st_mode
    except FileNotFoundError:
        return "a broken link" if file.is_symlink() else "no such file"
    except OSError as error:
        return error.strerror or str(error)
    return None if stat.S_ISREG(mode) else "not a plain file"


def read_bytes(file: Path, limit: int) -> bytes:
    """The content of a file of a stranger.

    Raises:
        ValueError: it is not a plain file, or is too large; the message begins with its name.
        OSError: it cannot be read, which the operating system says without the name.
    """
    name = short(file, 1000)
    if problem := problem_with_file(file):
        raise ValueError(f"{name}: {problem}")
    try:
        if os.stat(file).st_size > limit:
            raise ValueError(f"{name}: more than the limit of {limit} bytes")
        return file.read_bytes()
    except OSError as error:
        raise OSError(f"{name}: {error.strerror or error}") from error
