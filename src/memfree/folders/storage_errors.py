"""Where a disk is full, has too little room or may not be written: one line names the folder."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
