"""Exclusive lock for an output folder, and parts of one folder that several processes write."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import socket
import stat
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from memfree.folders import atomic
from memfree.slurm.launcher import is_first_process

ORPHAN_WAIT = 60.0
"""Seconds to wait for a killed process's children, which notice only after their batch."""
_BEGIN = '{"host":'
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)


class FolderLock:
    """A lock file at ``path`` that says who holds it; messages name ``what`` it locks.

    The lock is the operating system's (``filelock``): it ends with its process, and holds between
    machines on network file systems with locks. On those without, the file itself is the lock until
    its process ends or its Slurm job restarts. A process on another machine cannot be checked, so
    the message names the file to delete. Links and other files of that name are left alone.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self.what = what
        self._file: IO[str] | None = None

    def acquire(self, wait: float = 0.0) -> None:
        """Take the lock, or raise ValueError with host and process of its holder.

        ``wait``: seconds to wait for a live holder; children of an ended one get ``ORPHAN_WAIT``.
        """
        start = time.monotonic()
        while not self._try():
            holder = read_holder(self.path)
            if time.monotonic() - start >= (ORPHAN_WAIT if _has_ended(holder) else wait):
                who = "process {pid} on {host}, since {since}".format_map(defaultdict(str, holder))
                raise ValueError(
                    f"another process is writing to {self.what}{': ' + who if holder else ''}; "
                    f"wait for it or stop it (if it has ended, delete {self.path})"
                )
            time.sleep(0.05)

    def release(self) -> None:
        """Release the lock, if held, and remove its file."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):  # removed while it is still locked: nobody else's
            if _is_same_file(self._file, self.path):
                self.path.unlink(missing_ok=True)
        self._file.close()
        self._file = None

    def is_free(self) -> bool:
        """Whether nobody holds it; removes the file of a killed process."""
        if not self.path.exists():
            return True
        free = self._try()
        self.release()
        return free

    def _try(self) -> bool:
        assert self._file is None
        file, is_new = self._open()
        if file is None:
            return False
        try:
            locked = atomic.try_lock(file.fileno())
            # Its holder has removed or replaced it since it was opened: try again.
            if is_new if locked is None else locked and _is_same_file(file, self.path):
                file.truncate(0)
                file.write(json.dumps(_ourselves()))
                file.flush()
                if locked is None:  # other machines read it
                    os.fsync(file.fileno())
                self._file = file
                return True
        except BaseException:
            if is_new:
                self.path.unlink(missing_ok=True)
            file.close()
            raise
        file.close()
        return locked is None and self._remove_stale() and self._try()

    def _open(self) -> tuple[IO[str] | None, bool]:
        for _ in range(10):
            with contextlib.suppress(FileExistsError):
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NOFOLLOW, 0o666)
                return os.fdopen(handle, "r+", encoding="utf-8"), True
            with contextlib.suppress(FileNotFoundError):
                return self._open_existing(), False
        return None, False

    def _open_existing(self) -> IO[str]:
        """Refuses a link, a FIFO and a file that is not a lock."""
        foreign = f"{self.path} is not a lock file of memfree: move it away to write {self.what}"
        flags = os.O_RDWR | getattr(os, "O_NONBLOCK", 0) | _NOFOLLOW
        try:
            handle = os.open(self.path, flags)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise ValueError(foreign) from error
            raise
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise ValueError(foreign)
        file = os.fdopen(handle, "r+", encoding="utf-8", errors="replace")
        if file.read(len(_BEGIN)) not in ("", _BEGIN):  # empty: its maker has not written yet
            file.close()
            raise ValueError(foreign)
        file.seek(0)
        return file

    def _remove_stale(self) -> bool:
        """Guarded: another process that found the same file stale would remove the next lock."""
        if not _is_stale(read_holder(self.path)):
            return False
        guard = self.path.with_name(f"{self.path.name}.stale")
        try:
            os.close(os.open(guard, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        try:
            stale = _is_stale(read_holder(self.path))
            if stale:
                self.path.unlink(missing_ok=True)
        finally:
            guard.unlink(missing_ok=True)
        return stale


def read_holder(path: Path) -> dict[str, Any]:
    """``host``, ``pid``, ``since`` and ``job`` from a lock file; empty if unreadable."""
    if not path.is_file():  # a fifo would be waited for
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            value = json.loads(file.read(1 << 16))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _ourselves() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "job": _job(),
        "processes": _process_namespace(),
    }


def _process_namespace() -> str | None:
    """Scope of process numbers: containers may share host name and number 1."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return None


def _job() -> list[str] | None:
    """Slurm job number and restart count."""
    number = os.environ.get("SLURM_JOB_ID")
    return None if number is None else [number, os.environ.get("SLURM_RESTART_COUNT", "0")]


def _has_ended(holder: dict[str, Any]) -> bool:
    """Whether the process that wrote the file is known to have ended."""
    pid = holder.get("pid")
    is_local = holder.get("host") == socket.gethostname()
    is_local &= holder.get("processes") in (None, _process_namespace())
    if not is_local or not isinstance(pid, int):
        return False
    return pid != os.getpid() and not atomic.is_alive(pid)


def _is_stale(holder: dict[str, Any]) -> bool:
    """Without locks of the operating system: whether the file may be taken over."""
    job, ours = holder.get("job"), _job()
    same_job = isinstance(job, list) and ours is not None and job[:1] == ours[:1] and job != ours
    return _has_ended(holder) or same_job


def _is_same_file(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


Items = TypeVar("Items", bound=Sequence[Any])
ALL = "all"


@dataclass(frozen=True)
class Part:
    """Part ``number`` (from 1) of ``of`` disjoint parts."""

    number: int = 1
    of: int = 1

    def __str__(self) -> str:
        return ALL if self.whole else f"{self.number}/{self.of}"

    @property
    def whole(self) -> bool:
        """Whether this is the only part."""
        return self.of == 1

    def share(self, items: Items) -> Items:
        """Items of this part: of eight parts, the third has items 3, 11, 19, ..."""
        return items[self.number - 1 :: self.of]  # type: ignore[return-value]


WHOLE = Part()


def part_of(text: str) -> Part:
    """Parse ``--part``: ``all``, or its number and their count, as 3/8."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if text == ALL:
        return WHOLE
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--part {text}: pass all, or a part such as 3/8 (1/8 to 8/8)")
    return Part(int(match[1]), int(match[2]))


_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOSPC, errno.EDQUOT}
"""Errors of a place where no lock file can be written."""
_BEGINNING = 10.0
"""Seconds to wait for other parts, which hold the folder's own lock while they begin."""
_WAITING = 24 * 3600.0
"""Seconds to wait for the part that does what is done once."""


@contextmanager
def one_writer(out: Path, part: Part = WHOLE) -> Iterator[None]:
    """Lock the folder ``out`` against other commands; clear up after killed ones.

    The lock file ``.NAME.memfree.lock`` lies beside the folder (links resolved), or inside it if
    its parent is read-only; without either there is no lock. Of one distributed run only the first
    process locks. A part has its own lock, ``.NAME.memfree-3-of-8.lock``, which admits other parts
    of the same division only; the folder's lock then guards the beginning.

    A folder that a killed run moved aside is put back at once; other leftovers are removed only
    when the command succeeds, so one that is refused touches nothing.

    Raises:
        ValueError: another process writes there, or ``out`` is a circular link.
    """
    if not is_first_process() or out.is_file():
        yield
        return
    parents = _make_parents(out)
    lock = _acquire(out, part)
    with _released(lock, parents):
        with atomic.alone(out) if lock is not None and part.whole else contextlib.nullcontext():
            yield
        if lock is not None:
            _clear_up(out, part)


@contextmanager
def one_of_launch(out: Path) -> Iterator[None]:
    """Refuse a second process of one launch that does all of a study; clears nothing up."""
    parents = _make_parents(out)
    with _released(_first_writable(out, WHOLE), parents):
        yield


@contextmanager
def one_at_a_time(out: Path, part: Part) -> Iterator[None]:
    """Let one part that ``one_writer`` admits at a time do what is done once."""
    waits = not part.whole and is_first_process()
    with _released(_first_writable(out, WHOLE, _WAITING) if waits else None):
        yield


@contextmanager
def _released(lock: FolderLock | None, parents: Sequence[Path] = ()) -> Iterator[None]:
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
        atomic.remove_empty(parents)


def _acquire(out: Path, part: Part) -> FolderLock | None:
    whole = _first_writable(out, WHOLE, 0.0 if part.whole else _BEGINNING)
    if whole is None:
        return None
    with contextlib.ExitStack() as stack:
        stack.callback(whole.release)
        others = _parts_at_work(out)
        for path in others:
            if part.whole or not path.name.endswith(f"-of-{part.of}.lock"):
                _refuse_if_held(path, out)
        _refuse_older_version(out)
        lock = whole if part.whole else _first_writable(out, part)
        if not others:
            atomic.clear_up(out, sole_writer=True, put_back_only=True)
        if part.whole:
            stack.pop_all()  # it is kept
        return lock


def _clear_up(out: Path, part: Part) -> None:
    """Remove leftovers of killed runs, unless other parts are being written or begun."""
    whole = None
    if not part.whole:
        try:
            whole = _first_writable(out, WHOLE)
        except ValueError:
            return
        if whole is None:
            return
    with _released(whole):
        if part.whole or all(path.name.endswith(_name(part)) for path in _parts_at_work(out)):
            atomic.clear_up(out, sole_writer=True)
            atomic.remove_temporary(out)


def _parts_at_work(out: Path) -> list[Path]:
    """Held lock files of parts; removes those of killed processes."""
    place = _resolved(out)
    beside = place.parent.glob(f"{glob.escape(f'.{place.name}')}.memfree-*-of-*.lock")
    inside = place.glob(".memfree-*-of-*.lock")
    # Not ``.x.memfree-notes.memfree-1-of-2.lock``, which is of another folder.
    name = re.compile(rf"({re.escape(f'.{place.name}')})?\.memfree-\d+-of-\d+\.lock", re.DOTALL)
    locks = [path for path in (*beside, *inside) if name.fullmatch(path.name)]
    return [path for path in locks if not _lock(path, out).is_free()]


def _refuse_older_version(out: Path) -> None:
    """Heed ``.NAME.lock`` of earlier memfree versions; a killed one's is removed."""
    place = _resolved(out)
    for path in (place.parent / f".{place.name}.lock", place / ".lock"):
        # The present lock of a folder with a shorter name.
        is_present = re.search(r"\.memfree(-\d+-of-\d+)?\.lock$", path.name)
        if is_present or path.is_symlink():
            continue
        if read_holder(path).keys() >= {"host", "pid", "since"}:
            _refuse_if_held(path, out)


def _refuse_if_held(path: Path, out: Path) -> None:
    lock = _lock(path, out)
    lock.acquire()
    lock.release()


def _name(part: Part) -> str:
    """The word "memfree" tells part 1/2 of ``x`` from a folder ``x.1-of-2``."""
    return ".memfree.lock" if part.whole else f".memfree-{part.number}-of-{part.of}.lock"


def _first_writable(out: Path, part: Part, wait: float = 0.0) -> FolderLock | None:
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


def _make_parents(out: Path) -> list[Path]:
    """Make the parent folders of ``out``; returns new ones, innermost first."""
    place = _resolved(out)
    missing = [folder for folder in place.parents if not folder.exists()]
    with contextlib.suppress(OSError):  # the command's own attempt says why
        place.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _resolved(out: Path) -> Path:
    """Real path of ``out``, so that it has one lock under every name."""
    try:
        return out.resolve()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"--out {out} is a link that leads back to itself") from error
