"""Atomic writes: temporary names, files and whole folders that appear complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

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


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_SIGNS = {
    "No space left on device": _FULL,
    "StorageFull": _FULL,
    "os error 28": _FULL,
    "file write failed": _FULL,
    "Read-only file system": _READ_ONLY,
    "os error 30": _READ_ONLY,
}
"""Parts of the messages of libraries that write by themselves (safetensors, torch)."""


@contextmanager
def explained_storage(out: Path) -> Iterator[None]:
    """Name the output folder where writing fails, and say that what was there is unharmed.

    Args:
        out: the folder that is written inside.

    Raises:
        OSError: instead of what Python or a library raises for a full disk or a read-only folder.
    """
    try:
        yield
    except Exception as error:
        found = _causes(error)
        named = getattr(error, "filename", None)
        if any(one in _FULL for one in found):
            raise OSError(
                f"the disk of {_place(named, out)} is full; what was finished before is unharmed: "
                "make room and repeat the command"
            ) from error
        if errno.EROFS in found or (found and named is not None and _is_within(named, out)):
            raise OSError(
                f"{_place(named, out)} cannot be written: it is read-only or belongs to somebody "
                "else; choose another --out"
            ) from error
        raise


def _causes(error: BaseException) -> set[int]:
    """Kinds of storage trouble that an error tells of, as numbers of ``errno``.

    torch closes the archive that it could not write, and that error hides the one that matters.
    """
    if isinstance(error, OSError):
        return {error.errno} & {*_FULL, *_READ_ONLY} if error.errno is not None else set()
    found = {kinds[0] for sign, kinds in _SIGNS.items() if sign in str(error)}
    hidden = error.__context__
    if isinstance(error, RuntimeError) and isinstance(hidden, OSError):
        found |= _causes(hidden)
    return found


def _is_within(name: str | Path, out: Path) -> bool:
    """Whether a file is one that writing ``out`` writes: in it, or hidden beside it."""
    path, place = Path(name).absolute(), out.absolute()
    beside = path.parent == place.parent and path.name.startswith(f".{place.name}.")
    parents = path in (place, *place.parents)
    hidden = any(
        parent.parent == place.parent and parent.name.startswith(f".{place.name}.")
        for parent in path.parents
    )
    return beside or parents or hidden or place in path.parents


def _place(name: str | Path | None, out: Path) -> str:
    if name is None or _is_within(name, out):
        return f"--out {out}"
    return str(Path(name).parent)


def check_free_space(folder: Path, needed: int) -> None:
    """Refuse to start writing ``needed`` bytes where the disk has less.

    Raises:
        OSError: too little is free at the nearest existing parent of ``folder``.
    """
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(
            f"{folder} needs about {needed / 1e6:.1f} MB, but only {free / 1e6:.1f} MB is free; "
            "choose another --out or make room"
        )


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


_RESULTS = ("manifest.json", "model_index.json", "pytorch_lora_weights.safetensors")
"""One of them is in every folder that is put in place."""
_alone: ContextVar[frozenset[Path]] = ContextVar("alone", default=frozenset())


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Tell ``unfinished`` that no other run writes ``out``: this process holds its lock."""
    token = _alone.set(_alone.get() | {out.resolve()})
    try:
        yield
    finally:
        _alone.reset(token)


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` to work in, removed afterwards; leftovers of killed runs go first.

    Raises:
        OSError: the disk became full.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    clear_up(out, sole_writer=out in _alone.get())
    with new_folder(out) as folder:
        try:
            yield folder
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OSError(f"the disk of {out} is full; nothing was written to it") from error
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder: Path, out: Path, overwrite: bool) -> None:
    """Flush the finished folder to disk and rename it; an old one is moved aside, removed last.

    A run that is killed between the two renames leaves the old one beside ``out``, under a hidden
    name; ``put_back`` restores it.

    Raises:
        ValueError: ``out`` came into being while ``folder`` was written.
    """
    out, old = out.resolve(), folder.with_suffix(".old")
    _sync_all(folder)
    with held(out):
        if out.exists() and any(out.iterdir()):
            if not overwrite:
                raise ValueError(f"--out {out} appeared in the meantime; nothing was written to it")
            os.rename(out, old)
        elif out.exists():
            out.rmdir()
        try:
            os.rename(folder, out)
        except OSError:
            if old.exists():
                os.rename(old, out)
            raise
        sync(out.parent)
        shutil.rmtree(old, ignore_errors=True)


def check_place(out: Path) -> None:
    """Find out before the work whether a finished folder could be put in the place of ``out``.

    Raises:
        ValueError: ``out`` is where a file system is mounted, which cannot be renamed or replaced.
        OSError: nothing can be written beside it.
    """
    refuse_mount_point(out)
    out = out.resolve()
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(out) as probe:
            probe.rmdir()
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


def refuse_mount_point(out: Path) -> None:
    """Refuse a folder where a file system is mounted, or inside of which one is.

    The first can be neither renamed nor replaced, the second would be emptied.

    Raises:
        ValueError: it is one.
    """
    place = out.resolve()
    if place.is_dir() and _is_mounted(place):
        raise ValueError(
            f"--out {out} is or holds a mount point, which the finished folder cannot replace: "
            f"name another folder, such as {out / 'result'}"
        )


def _is_mounted(folder: Path) -> bool:
    """Whether a file system, or a folder of one, is mounted just there or below."""
    if os.path.ismount(folder):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    # A folder of the same file system, as containers mount it. Spaces and the like are octal.
    places = (line.split()[4] for line in lines if len(line.split()) > 4)
    names = (re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), at) for at in places)
    place = os.fsencode(folder)
    return any(name == place or name.startswith(place + b"/") for name in names)


def put_back(out: Path) -> None:
    """Restore what a killed run moved aside and did not replace any more; touches nothing else.

    Args:
        out: the folder; this process holds its lock.
    """
    out = out.resolve()
    for left, suffix in _leftovers(out, sole_writer=True):
        if suffix == "old" and not out.exists():
            os.rename(left, out)
            sync(out.parent)


def clear_up(out: Path, sole_writer: bool = False) -> None:
    """Undo what killed runs left beside ``out``, and nothing that belongs to another folder.

    A folder that was moved aside and not replaced any more is put back; what was half-written is
    removed, and so is a folder moved aside once the one that replaces it is in place.

    Args:
        out: the folder that they were writing.
        sole_writer: whether this process holds the lock of ``out``, so that no run of which it
            cannot be known whether it has ended is writing there.
    """
    out = out.resolve()
    for left, suffix in _leftovers(out, sole_writer):
        if suffix == "old" and not out.exists():
            os.rename(left, out)
            sync(out.parent)
        elif suffix == "partial" or any(out.iterdir()):
            shutil.rmtree(left, ignore_errors=True)


def is_alive(pid: int) -> bool:
    """Whether another process of this number runs on this machine; ours is not another one."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _leftovers(out: Path, sole_writer: bool) -> list[tuple[Path, str]]:
    """Hidden folders of runs that wrote ``out`` and have ended, and the suffix of each.

    Earlier versions had host and process in the name: ``.NAME.HOST-PID.partial``. A host with a dot
    is believed only if it is this one: ``.x.v2.node7-12.partial`` is of ``x.v2``, not of ``x``.
    """
    name = re.compile(
        re.escape(f".{out.name}.") + rf"(?:({RANDOM})|(.+)-(\d+))\.(partial|old)", re.DOTALL
    )
    found = []
    for left in out.parent.glob(f"{glob.escape(f'.{out.name}.')}*"):
        match = name.fullmatch(left.name)
        if match is None or left.is_symlink() or not left.is_dir():
            continue
        random, host, number, suffix = match.groups()
        if random is not None:
            holder = is_held(left)
            is_known = holder is not None and is_of_this_machine(random)
            ended = not holder and (sole_writer or is_known)
        elif host == socket.gethostname():
            ended = not is_alive(int(number)) and (sole_writer or int(number) != os.getpid())
        else:
            ended = sole_writer and "." not in host
        if random is None and suffix == "old":  # perhaps somebody's own, as .x.backup-2024.old
            ended &= any((left / name).exists() for name in _RESULTS) or not any(left.iterdir())
        if ended:
            found.append((left, suffix))
    return found


def _sync_all(folder: Path) -> None:
    """Flush all files of a folder, and then the names of them."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what is within, before its folder
        sync(path)
    sync(folder)
