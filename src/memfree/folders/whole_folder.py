"""A folder that appears complete or not at all."""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memfree.folders.atomic_files import sync


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` to work in, removed afterwards; leftovers of killed runs go first.

    Raises:
        OSError: the disk became full.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    clear_up(out)
    folder = out.parent / f".{out.name}.{socket.gethostname()}-{os.getpid()}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
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
    name; ``clear_up`` puts it back.

    Raises:
        ValueError: ``out`` came into being while ``folder`` was written.
    """
    out, old = out.resolve(), folder.with_suffix(".old")
    _sync_all(folder)
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


def clear_up(out: Path, sole_writer: bool = False) -> None:
    """Undo what killed runs left beside ``out``.

    A folder that was moved aside and not replaced any more is put back; what was half-written is
    removed, and so is a folder moved aside once the one that replaces it is in place.

    Args:
        out: the folder that they were writing.
        sole_writer: whether this process holds the lock of ``out``, so that no run on another
            machine, of which cannot be known whether it has ended, is writing there.
    """
    out = out.resolve()
    for left, host, pid in _leftovers(out):
        ended = not is_alive(pid) if host == socket.gethostname() else sole_writer
        if not ended:
            continue
        if left.suffix == ".old" and not out.exists():
            os.rename(left, out)
            sync(out.parent)
        elif left.suffix == ".partial" or any(out.iterdir()):
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


def _leftovers(out: Path) -> list[tuple[Path, str, int]]:
    """Hidden folders of runs that wrote ``out``, with the host and the process of each."""
    name = re.compile(re.escape(f".{out.name}.") + r"(.+)-(\d+)\.(partial|old)")
    found = []
    for left in out.parent.glob(f"{glob.escape(f'.{out.name}.')}*"):
        if match := name.fullmatch(left.name):
            found.append((left, match[1], int(match[2])))
    return found


def _sync_all(folder: Path) -> None:
    """Flush all files of a folder, and then the names of them."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what is within, before its folder
        sync(path)
    sync(folder)
