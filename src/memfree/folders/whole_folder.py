"""A folder that appears complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from memfree.folders.atomic_files import sync
from memfree.folders.temporary import RANDOM, held, is_held, is_of_this_machine, new_folder

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
