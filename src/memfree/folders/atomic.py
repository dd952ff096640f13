"""Atomic writes: temporary names, and files and folders that appear complete or not at all."""

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

RANDOM = "[0-9a-f]{24}"
"""Random part of a temporary name; its first third tells the machine. Without a dot, so that no
temporary name of ``x`` is one of ``x.v2``."""
_TEMPORARY = re.compile(rf"\..+\.({RANDOM}|\d+)\.tmp")  # earlier versions: number of the process
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def try_lock(handle: int) -> bool | None:
    """Lock an open file if nobody holds it; None if the file system has no locks."""
    from filelock import lock_descriptor  # `memfree --help` should not wait for it

    try:
        return lock_descriptor(handle, blocking=False)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None


@contextmanager
def _new_file(path: Path, mode: int) -> Iterator[Path]:
    temporary = _random_name(path, "tmp")
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NOFOLLOW, mode)
    try:
        if os.name == "nt":  # renames no open file
            os.close(handle)
            handle = -1
        else:
            _lock(handle)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        if handle >= 0:
            os.close(handle)


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    while True:
        folder = _random_name(path, "partial")
        folder.mkdir()
        with _held(folder) as is_there:
            if is_there:  # no other process cleared it up before it was locked
                yield folder
                return


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    try:
        handle = os.open(folder, os.O_RDONLY | _NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        yield isinstance(error, PermissionError)  # Windows opens no folders
        return
    try:
        _lock(handle)
        exists = False
        with contextlib.suppress(OSError):
            exists = os.path.samestat(os.fstat(handle), folder.stat())
        yield exists
    finally:
        os.close(handle)


def _lock(handle: int) -> None:
    with contextlib.suppress(OSError):
        try_lock(handle)


def _is_held(path: Path) -> bool | None:
    """Whether the process that wrote a temporary file or folder still runs; None if unknown."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _NOFOLLOW)
    except OSError:
        return None
    try:
        locked = try_lock(handle)
    except OSError:
        return None
    finally:
        os.close(handle)
    return None if locked is None else not locked


def remove_temporary(*folders: Path, pattern: str = ".*.tmp") -> None:
    """Remove temporary files that match ``pattern`` and whose process was killed."""
    for folder in folders:
        for path in folder.glob(pattern):
            if not _TEMPORARY.fullmatch(path.name) or _is_held(path):
                continue
            with contextlib.suppress(OSError):
                if stat.S_ISREG(path.lstat().st_mode):
                    path.unlink()


def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _random_name(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{_machine()}{secrets.token_hex(8)}.{suffix}")


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_MESSAGES = {
    "No space left on device": errno.ENOSPC,
    "StorageFull": errno.ENOSPC,
    "os error 28": errno.ENOSPC,
    "file write failed": errno.ENOSPC,
    "Read-only file system": errno.EROFS,
    "os error 30": errno.EROFS,
}
"""Error messages of libraries that write files on their own (safetensors, torch)."""


@contextmanager
def explained_storage(out: Path) -> Iterator[None]:
    """Turn errors of a full disk or a read-only folder into an OSError that names ``out``."""
    try:
        yield
    except Exception as error:
        causes, name = _causes(error), getattr(error, "filename", None)
        is_own = name is not None and _is_within(name, out)
        place = f"--out {out}" if name is None or is_own else Path(name).parent
        if causes & _FULL:
            raise OSError(
                f"the disk of {place} is full; what was finished before is unharmed: make room and "
                "repeat the command"
            ) from error
        if errno.EROFS in causes or (causes and is_own):
            raise OSError(
                f"{place} cannot be written: it is read-only or belongs to somebody else; choose "
                "another --out"
            ) from error
        raise


def _causes(error: BaseException) -> set[int]:
    if isinstance(error, OSError):
        return {error.errno} & (_FULL | _READ_ONLY) if error.errno is not None else set()
    causes = {number for text, number in _MESSAGES.items() if text in str(error)}
    # torch closes the archive that it could not write, and that error hides the one that matters.
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        causes |= _causes(error.__context__)
    return causes


def _is_within(name: str | Path, out: Path) -> bool:
    path, place = Path(name).absolute(), out.absolute()
    is_hidden_beside = any(
        part.parent == place.parent and part.name.startswith(f".{place.name}.")
        for part in (path, *path.parents)
    )
    return is_hidden_beside or path in (place, *place.parents) or place in path.parents


def check_free_space(folder: Path, needed: int) -> None:
    """Raise OSError if the disk of ``folder``, which need not exist, has too few free bytes."""
    place = folder.absolute()
    existing = next(path for path in (place, *place.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"{folder} needs about {needed / 1e6:.1f} MB, but only {free / 1e6:.1f} MB is free; "
            "choose another --out or make room"
        )


def write_atomic(path: Path, write: Callable[[Path], object], mode: int = 0o666) -> None:
    """Call ``write`` on a temporary file beside ``path``, flush it and rename it.

    ``path`` holds the old or the new content, whole; once this returns, the new content and new
    parent folders survive a power loss. ``mode``: permissions of the file, less the umask.
    """
    _make_folder(path.parent)
    with _new_file(path, mode) as temporary:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN and infinities are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():  # Windows opens no folders
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems flush no folders.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


_RESULTS = ("manifest.json", "model_index.json", "pytorch_lora_weights.safetensors")
"""Every folder that is put in place has one of these files."""
_alone: ContextVar[frozenset[Path]] = ContextVar("alone", default=frozenset())


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Tell ``unfinished`` that this process holds the lock of ``out``."""
    token = _alone.set(_alone.get() | {out.resolve()})
    try:
        yield
    finally:
        _alone.reset(token)


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """Temporary working folder beside ``out``; removes leftovers of killed runs first."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    clear_up(out, sole_writer=out in _alone.get())
    with _new_folder(out) as folder:
        try:
            yield folder
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OSError(f"the disk of {out} is full; nothing was written to it") from error
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder: Path, out: Path, overwrite: bool) -> None:
    """Flush the finished folder and rename it; an old one is moved aside and removed last.

    A run killed between the two renames leaves the old one hidden beside ``out`` for ``clear_up``.
    """
    out, old = out.resolve(), folder.with_suffix(".old")
    for path in sorted(folder.rglob("*"), reverse=True):  # what is within, before its folder
        sync(path)
    sync(folder)
    with _held(out):
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
    """Raise ValueError or OSError if a finished folder could not replace ``out``."""
    refuse_mount_point(out)
    out = out.resolve()
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _new_folder(out) as probe:
            probe.rmdir()
    finally:
        remove_empty(missing)


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove these folders, innermost first, if they are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def refuse_mount_point(out: Path) -> None:
    """Refuse a mount point, which cannot be replaced, or a folder around one."""
    place = out.resolve()
    if place.is_dir() and _is_mounted(place):
        raise ValueError(
            f"--out {out} is or holds a mount point, which the finished folder cannot replace: "
            f"name another folder, such as {out / 'result'}"
        )


def _is_mounted(folder: Path) -> bool:
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


def clear_up(out: Path, sole_writer: bool = False, put_back_only: bool = False) -> None:
    """Undo what killed runs left beside ``out``, and nothing that belongs to another folder.

    Puts back a folder that was moved aside and not replaced; unless ``put_back_only``, removes the
    rest. ``sole_writer``: this process holds the lock of ``out``, so no other run writes there.
    """
    out = out.resolve()
    for left, suffix in _leftovers(out, sole_writer):
        if suffix == "old" and not out.exists():
            os.rename(left, out)
            sync(out.parent)
        elif not put_back_only and (suffix == "partial" or any(out.iterdir())):
            shutil.rmtree(left, ignore_errors=True)


def is_alive(pid: int) -> bool:
    """Whether another process with this number runs on this machine."""
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
    """Hidden folders of ended runs that wrote ``out``, with their suffixes.

    Earlier versions wrote ``.NAME.HOST-PID.partial``. A host with a dot counts only if it is this
    one: ``.x.v2.node7-12.partial`` belongs to ``x.v2``, not to ``x``.
    """
    name = re.compile(
        re.escape(f".{out.name}.") + rf"(?:({RANDOM})|(.+)-(\d+))\.(partial|old)", re.DOTALL
    )
    leftovers = []
    for left in out.parent.glob(f"{glob.escape(f'.{out.name}.')}*"):
        match = name.fullmatch(left.name)
        if match is None or left.is_symlink() or not left.is_dir():
            continue
        random, host, number, suffix = match.groups()
        if random is not None:
            is_held = _is_held(left)
            # Locks of some file systems hold on one machine only.
            is_known = is_held is not None and random.startswith(_machine())
            ended = not is_held and (sole_writer or is_known)
        elif host == socket.gethostname():
            ended = not is_alive(int(number)) and (sole_writer or int(number) != os.getpid())
        else:
            ended = sole_writer and "." not in host
        if random is None and suffix == "old":  # perhaps the user's own, as .x.backup-2024.old
            ended &= any((left / name).exists() for name in _RESULTS) or not any(left.iterdir())
        if ended:
            leftovers.append((left, suffix))
    return leftovers
