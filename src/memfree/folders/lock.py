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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from memfree.folders.atomic import alone, clear_up, is_alive, put_back, remove_temporary
from memfree.slurm.launcher import is_first_process

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

ORPHAN_WAIT = 60.0
"""Seconds to wait for what a killed process has started: it notices only after its batch."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What a file system without locks answers."""
_BEGIN = '{"host":'
"""What a lock file begins with."""
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)


class FolderLock:
    """A lock file that says who holds it.

    The lock is the operating system's (``flock``): it ends with its process, however that ends, so
    a file that a killed process left behind is no lock. On network file systems with locks it holds
    between machines as well. On those without, the file itself is the lock: it is stale if its
    process has ended, or belongs to an earlier start of this very SLURM job; of a process on
    another machine that cannot be known, and the message says which file to delete. Whoever makes
    the file has that lock, so one that does not say yet who holds it is held.

    A file of that name that is not a lock file is neither written nor removed, and links are not
    followed.

    Args:
        path: the lock file.
        what: what is locked, as the message names it: ``--out runs/model``.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self.what = what
        self._file: IO[str] | None = None

    def acquire(self, wait: float = 0.0) -> None:
        """Take the lock, or refuse.

        Args:
            wait: seconds to wait for a holder that is alive. Where its process has ended and only
                what it started is left, ``ORPHAN_WAIT`` seconds are waited in any case.

        Raises:
            ValueError: another process holds it; names host and process. Or something else than a
                lock file has its name.
            OSError: the file cannot be written.
        """
        start = time.monotonic()
        while not self._try():
            holder = read_holder(self.path)
            patience = ORPHAN_WAIT if _has_ended(holder) else wait
            if time.monotonic() - start >= patience:
                raise ValueError(self._refusal(holder))
            time.sleep(0.05)

    def release(self) -> None:
        """Give the lock up and remove its file; nothing where it is not held."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):  # removed while it is still locked: nobody else's
            if _is_same_file(self._file, self.path):
                self.path.unlink(missing_ok=True)
        self._file.close()
        self._file = None

    def is_free(self) -> bool:
        """Whether nobody holds it; the file that a killed process left behind is removed."""
        if not self.path.exists():
            return True
        free = self._try()
        self.release()
        return free

    def _try(self) -> bool:
        """Take the lock if it is free."""
        assert self._file is None
        file, made = self._open()
        if file is None:
            return False
        try:
            locked = _flock(file)
            # Removed by its holder since it was opened, or another's by now: try again.
            free = made if locked is None else locked and _is_same_file(file, self.path)
            if free:
                self._say_who(file, to_all_machines=locked is None)
                self._file = file
                return True
        except BaseException:
            if made:
                self.path.unlink(missing_ok=True)
            file.close()
            raise
        file.close()
        return locked is None and self._remove_stale() and self._try()

    def _open(self) -> tuple[IO[str] | None, bool]:
        """The file, and whether it was made here; None if it comes and goes."""
        for _ in range(10):
            with contextlib.suppress(FileExistsError):
                made = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NOFOLLOW, 0o666)
                return os.fdopen(made, "r+", encoding="utf-8"), True
            with contextlib.suppress(FileNotFoundError):
                return self._open_existing(), False
        return None, False

    def _open_existing(self) -> IO[str]:
        """The file, which an earlier process has made, as its content shows.

        Raises:
            ValueError: it is a link, no plain file, or somebody's own.
        """
        try:
            opened = os.open(self.path, os.O_RDWR | os.O_NONBLOCK | _NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise ValueError(self._foreign()) from error
            raise
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            os.close(opened)
            raise ValueError(self._foreign())
        file = os.fdopen(opened, "r+", encoding="utf-8", errors="replace")
        # Empty: its maker has not come to write into it.
        if file.read(len(_BEGIN)) not in ("", _BEGIN):
            file.close()
            raise ValueError(self._foreign())
        file.seek(0)
        return file

    def _foreign(self) -> str:
        return f"{self.path} is not a lock file of memfree: move it away to write {self.what}"

    def _say_who(self, file: IO[str], to_all_machines: bool) -> None:
        file.truncate(0)
        file.write(json.dumps(_ourselves()))
        file.flush()
        if to_all_machines:
            os.fsync(file.fileno())

    def _remove_stale(self) -> bool:
        """Without locks: remove the file if it is stale; whether it is gone.

        One process at a time: another that has found it stale before would remove the next lock.
        """
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

    def _refusal(self, holder: dict[str, Any]) -> str:
        if not holder:
            return (
                f"another process is writing to {self.what}; wait for it or stop it "
                f"(if it has ended, delete {self.path})"
            )
        return (
            f"another process is writing to {self.what}: process {holder.get('pid')} on "
            f"{holder.get('host')}, since {holder.get('since')}; wait for it or stop it "
            f"(if it has ended, delete {self.path})"
        )


def read_holder(path: Path) -> dict[str, Any]:
    """Who holds a lock file: ``host``, ``pid``, ``since``, ``job``; empty where it does not say."""
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
    """Within what process numbers count: containers may share host name and number 1."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _job() -> list[str] | None:
    """Number of the SLURM job and how often it was started again."""
    number = os.environ.get("SLURM_JOB_ID")
    return None if number is None else [number, os.environ.get("SLURM_RESTART_COUNT", "0")]


def _has_ended(holder: dict[str, Any]) -> bool:
    """Whether the process that wrote the file is known to have ended."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    if holder.get("processes") not in (None, _process_namespace()):
        return False
    return pid != os.getpid() and not is_alive(pid)


def _flock(file: IO[str]) -> bool | None:
    """Lock a file if it is free; whether it is ours, None where there are no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


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
_PART = re.compile(r"(\d{1,6})/(\d{1,6})")


@dataclass(frozen=True)
class Part:
    """One of several disjoint parts that together are the whole."""

    number: int = 1
    """From 1."""
    of: int = 1
    """How many parts there are."""

    def __str__(self) -> str:
        return ALL if self.whole else f"{self.number}/{self.of}"

    @property
    def whole(self) -> bool:
        """Whether there is nothing beside it."""
        return self.of == 1

    def share(self, items: Items) -> Items:
        """The items of this part: of eight parts, the third has items 3, 11, 19, ..."""
        return items[self.number - 1 :: self.of]  # type: ignore[return-value]


WHOLE = Part()


def part_of(text: str) -> Part:
    """What ``--part`` says: ``all``, or the number of a part and how many there are.

    Raises:
        ValueError: it says something else.
    """
    found = _PART.fullmatch(text)
    if text == ALL:
        return WHOLE
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"--part {text}: say all, or a part such as 3/8 (1/8 to 8/8)")
    return Part(int(found[1]), int(found[2]))


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
