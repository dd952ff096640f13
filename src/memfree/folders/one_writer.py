"""One writer for a folder, or one for each part of it: a second one is refused."""

from __future__ import annotations

import contextlib
import errno
import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memfree.first_process import is_first_process
from memfree.folders.folder_lock import FolderLock, read_holder
from memfree.folders.part import WHOLE, Part
from memfree.folders.temporary import remove_temporary
from memfree.folders.whole_folder import alone, clear_up, put_back

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

_LOCK = re.compile(r"\.memfree(-\d+-of-\d+)?\.lock$")
"""Names of lock files; see ``_name``."""


@contextmanager
def one_writer(out: Path, part: Part = WHOLE) -> Iterator[None]:
    """Keep other commands from writing the folder ``out``; clear up after killed ones.

    The lock file lies beside the folder (that a link leads to), ``.NAME.memfree.lock``, or inside
    it where nothing may be written beside it; it is removed at the end. Of the processes of one
    distributed run only the first locks. Where neither place can be written there is no lock: what
    the command then tries to write says so.

    A part has a lock of its own, ``.NAME.memfree-3-of-8.lock``, beside which other parts of the
    same division may be written, but nothing else. The folder's own lock then guards the beginning.

    At first only a folder that a killed run moved aside is put back. What killed runs left else is
    removed at the end of a command that succeeds: one that is refused has touched nothing.

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
        with alone(out) if lock is not None and part.whole else contextlib.nullcontext():
            yield
        if lock is not None:
            _clear_up(out, part)
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
    lock = _first_writable(out, WHOLE)
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
    lock = None if alone else _first_writable(out, WHOLE, _WAITING)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _acquire(out: Path, part: Part) -> FolderLock | None:
    whole = _first_writable(out, WHOLE, 0.0 if part.whole else _BEGINNING)
    if whole is None:
        return None
    try:
        others = _parts_at_work(out)
        for path in others:
            if part.whole or not path.name.endswith(f"-of-{part.of}.lock"):
                held = _lock(path, out)
                held.acquire()  # refuses, by its host and process
                held.release()
        _refuse_older_version(out)
        mine = whole if part.whole else _first_writable(out, part)
        if not others:
            put_back(out)
        return mine
    except BaseException:
        whole.release()
        raise
    finally:
        if not part.whole:
            whole.release()


def _clear_up(out: Path, part: Part) -> None:
    """Remove what killed runs left, unless other parts are being written or begun."""
    if part.whole:
        clear_up(out, sole_writer=True)
        remove_temporary(out)
        return
    try:
        whole = _first_writable(out, WHOLE)
    except ValueError:
        return
    if whole is None:
        return
    try:
        own = _name(part)
        if not [path for path in _parts_at_work(out) if not path.name.endswith(own)]:
            clear_up(out, sole_writer=True)
            remove_temporary(out)
    finally:
        whole.release()


def _parts_at_work(out: Path) -> list[Path]:
    """Lock files of parts that a process holds; those of killed processes are removed."""
    return [path for path in _part_locks(out) if not _lock(path, out).is_free()]


def _refuse_older_version(out: Path) -> None:
    """Heed the lock of an earlier version of memfree, ``.NAME.lock``; a killed one's is removed."""
    place = _resolved(out)
    for path in (place.parent / f".{place.name}.lock", place / ".lock"):
        if _LOCK.search(path.name) or path.is_symlink():
            continue  # the present lock of a folder with a shorter name
        if read_holder(path).keys() >= {"host", "pid", "since"}:
            lock = _lock(path, out)
            lock.acquire()
            lock.release()


def _name(part: Part) -> str:
    """What the name of a part's lock file ends with.

    The word in it keeps the lock of ``x --part 1/2`` apart from that of a folder ``x.1-of-2``.
    """
    return ".memfree.lock" if part.whole else f".memfree-{part.number}-of-{part.of}.lock"


def _first_writable(out: Path, part: Part, wait: float = 0.0) -> FolderLock | None:
    """The lock of a part beside ``out`` or in it, taken; None where neither can be written."""
    place = _resolved(out)
    for path in (place.parent / f".{place.name}{_name(part)}", place / _name(part)):
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
    beside = place.parent.glob(f"{glob.escape(f'.{place.name}')}.memfree-*-of-*.lock")
    inside = place.glob(".memfree-*-of-*.lock")
    # Not ``.x.memfree-notes.memfree-1-of-2.lock``, which is of another folder.
    ours = re.compile(rf"({re.escape(f'.{place.name}')})?\.memfree-\d+-of-\d+\.lock", re.DOTALL)
    return [path for path in (*beside, *inside) if ours.fullmatch(path.name)]


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
