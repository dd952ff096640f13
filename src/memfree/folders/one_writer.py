"""One writer for a folder, or one for each part of it: a second one is refused."""

from __future__ import annotations

import contextlib
import errno
import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memfree.first_process import is_first_process
from memfree.folders.atomic_files import remove_temporary
from memfree.folders.folder_lock import FolderLock
from memfree.folders.part import WHOLE, Part
from memfree.folders.whole_folder import clear_up

_UNWRITABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOSPC,
    errno.EDQUOT,
)
"""What a place answers where no lock file can be made."""
_BEGINNING = 10.0
"""Seconds to wait for other parts, which hold the folder's own lock while they begin."""
_WAITING = 24 * 3600.0
"""Seconds to wait for the part that does what is done once."""


@contextmanager
def one_writer(out: Path, part: Part = WHOLE) -> Iterator[None]:
    """Keep other commands from writing the folder ``out``; clear up what a killed one left.

    The lock file lies beside the folder (that a link leads to), ``.NAME.lock``, or inside it where
    nothing may be written beside it; it is removed at the end. Of the processes of one distributed
    run only the first locks. Where neither place can be written there is no lock: what the command
    then tries to write says so.

    A part has a lock of its own, ``.NAME.part-3-of-8.lock``, beside which other parts of the same
    division may be written, but nothing else. The folder's own lock then guards the beginning.

    Args:
        out: the folder.
        part: what is written of it.

    Raises:
        ValueError: another process writes there; one line with its host and process. Or ``out`` is
            a link in a circle.
    """
    if not is_first_process() or out.is_file():
        yield
        return
    made = _missing_parents(out)
    lock = _acquire(out, part)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
        for folder in made:
            with contextlib.suppress(OSError):  # not empty: the command has made something
                folder.rmdir()


@contextmanager
def one_of_launch(out: Path) -> Iterator[None]:
    """Refuse another process of the same launch that does the whole of what commands share.

    Args:
        out: the folder, in which each command has a lock of its own; nothing is cleared up.

    Raises:
        ValueError: another process does it.
    """
    made = _missing_parents(out)
    lock = _first_writable(out, "")
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
        for folder in made:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


@contextmanager
def one_at_a_time(out: Path, part: Part) -> Iterator[None]:
    """Among several parts, do alone what is done once, as to finish the folder.

    Args:
        out: the folder.
        part: what this process writes of it, as ``one_writer`` knows; the whole waits for nobody.
    """
    alone = part.whole or not is_first_process()
    lock = None if alone else _first_writable(out, "", _WAITING)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _acquire(out: Path, part: Part) -> FolderLock | None:
    whole = _first_writable(out, "", 0.0 if part.whole else _BEGINNING)
    if whole is None:
        return None
    try:
        others = [path for path in _part_locks(out) if not _lock(path, out).is_free()]
        for path in others:
            if part.whole or not path.name.endswith(f"-of-{part.of}.lock"):
                held = _lock(path, out)
                held.acquire()  # refuses, by its host and process
                held.release()
        mine = whole if part.whole else _first_writable(out, f".part-{part.number}-of-{part.of}")
        if not others:
            clear_up(out, sole_writer=True)
            remove_temporary(out)
        return mine
    except BaseException:
        whole.release()
        raise
    finally:
        if not part.whole:
            whole.release()


def _first_writable(out: Path, suffix: str, wait: float = 0.0) -> FolderLock | None:
    """The lock of this suffix beside ``out`` or in it, taken; None where neither can be written."""
    place = _resolved(out)
    for path in (place.parent / f".{place.name}{suffix}.lock", place / f"{suffix}.lock"):
        lock = _lock(path, out)
        try:
            lock.acquire(wait)
        except OSError as error:
            if error.errno not in _UNWRITABLE:
                raise
        else:
            return lock
    return None


def _lock(path: Path, out: Path) -> FolderLock:
    return FolderLock(path, f"--out {out}")


def _part_locks(out: Path) -> list[Path]:
    """Lock files of parts, beside the folder and in it."""
    place = _resolved(out)
    name = f"{glob.escape(f'.{place.name}')}.part-*-of-*.lock"
    return [*place.parent.glob(name), *place.glob(".part-*-of-*.lock")]


def _missing_parents(out: Path) -> list[Path]:
    """Make the folder that ``out`` will be in; what had to be made, the innermost first."""
    place = _resolved(out)
    missing = [folder for folder in place.parents if not folder.exists()]
    with contextlib.suppress(OSError):  # the command's own attempt says why
        place.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _resolved(out: Path) -> Path:
    """Where ``out`` really is, so that it has one lock by whatever name it is called."""
    try:
        return out.resolve()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"--out {out} is a link that leads back to itself") from error
