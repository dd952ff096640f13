"""A folder that appears complete or not at all."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` to work in, removed afterwards; leftovers of killed runs go first.

    Raises:
        OSError: the disk became full.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.{socket.gethostname()}-"
    for left in out.parent.glob(f"{glob.escape(prefix)}*"):
        pid, _, kind = left.name[len(prefix) :].partition(".")
        # a folder moved aside goes only where the one that replaces it is in place
        if (
            pid.isdigit()
            and not _alive(int(pid))
            and (kind == "partial" or (out / "manifest.json").exists())
        ):
            shutil.rmtree(left, ignore_errors=True)
    folder = out.parent / f"{prefix}{os.getpid()}.partial"
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


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def put_in_place(folder: Path, out: Path, overwrite: bool) -> None:
    """Rename the finished folder; an old one is moved aside first and removed last.

    A run that is killed between the two leaves the old one beside ``out``, under a hidden name,
    until the next has put another in its place.

    Raises:
        ValueError: ``out`` came into being while ``folder`` was written.
    """
    out, old = out.resolve(), folder.with_suffix(".old")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise ValueError(f"--out {out} appeared in the meantime; nothing was written to it")
        os.rename(out, old)
    elif out.exists():
        out.rmdir()
    os.rename(folder, out)
    shutil.rmtree(old, ignore_errors=True)
