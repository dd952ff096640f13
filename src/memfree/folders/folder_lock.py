"""A lock file that tells a second process which host and process hold it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import time
from pathlib import Path
from typing import IO, Any

from memfree.folders.whole_folder import is_alive

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
