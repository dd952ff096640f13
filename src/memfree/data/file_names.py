"""File names of pictures and records: keys, suffixes, and what of a folder is read."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from typing import Literal

from memfree.data.skipped import LeftOut, Skipped
from memfree.folders.untrusted import short

SUFFIXES = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
"""Lower-case file name endings of readable formats (PNG, JPEG, WEBP)."""
OTHER_PICTURES = (
    *(".avif", ".avifs", ".bmp", ".dib", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jp2", ".jxl"),
    *(".jpx", ".pbm", ".pcx", ".pgm", ".pnm", ".ppm", ".psd", ".qoi", ".svg", ".tga", ".tif"),
    *(".tiff", ".arw", ".cr2", ".cr3", ".dng", ".exr", ".hdr", ".nef", ".orf", ".raf", ".rw2"),
)
"""Lower-case file name endings of other picture formats."""
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
"""Lower-case file name endings of shards."""
MAX_NAME = 4096
"""Longest name of a record, in characters: the longest path of most systems."""
_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
_FIRST_DOT = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)


def is_tar(name: str) -> bool:
    """Whether a file name is that of a shard: ``.tar``, compressed or not."""
    return name.lower().endswith(TAR_SUFFIXES)


def is_hidden(name: str) -> bool:
    """Whether a path is hidden or a system's: ``.ipynb_checkpoints/a``, ``__MACOSX/a``, ``._a``."""
    return any(
        part in _SYSTEM_FOLDERS or (part.startswith(".") and part not in (".", ".."))
        for part in name.split("/")
    )


def split_name(name: str, key_ends: Literal["first_dot", "last_dot"]) -> tuple[str, str]:
    """Key (with folders) and suffix (lower case, no dot, or empty) of a shard member.

    ``first_dot``, WebDataset's rule, makes ``k.seg.png`` the part ``seg.png`` of sample ``k``;
    ``last_dot`` makes it the picture of record ``k.seg``.
    """
    if key_ends == "first_dot":
        match = _FIRST_DOT.fullmatch(name)
        return (match[1], match[2].lower()) if match else (name, "")
    suffix = PurePosixPath(name).suffix
    return (name.removesuffix(suffix), suffix[1:].lower()) if suffix else (name, "")


def problem_with(name: str) -> str | None:
    """Why a name (line breaks, terminal commands, bad UTF-8) cannot be a key; else None."""
    if name.startswith("/"):
        return "is absolute"
    if ".." in name.split("/"):
        return "climbs with .."
    if len(name) > MAX_NAME:
        return f"has {len(name)} characters, the limit is {MAX_NAME}"
    if any(unicodedata.category(character) == "Cs" for character in name):
        return "is not UTF-8"
    return None if is_text(name) else "has control characters"


def is_text(text: str) -> bool:
    """Whether a text is valid UTF-8, on one line and without terminal commands."""
    return not {unicodedata.category(character) for character in text} & {"Cc", "Cs", "Zl", "Zp"}


def shard_labels(shards: Sequence[str]) -> list[str]:
    """Label of each shard's records, ``00000`` for ``x/00000.tar``; longer if not unique."""
    labels = [Path(shard).name.split(".")[0] for shard in shards]
    for level in range(1, 2 + max((len(Path(shard).parts) for shard in shards), default=0)):
        taken: dict[str, set[str]] = {}
        for label, shard in zip(labels, shards, strict=True):
            taken.setdefault(label, set()).add(shard)
        if all(len(sharing) == 1 for sharing in taken.values()):
            break
        labels = [
            label if len(taken[label]) == 1 else _longer(shard, level)
            for label, shard in zip(labels, shards, strict=True)
        ]
    return labels


def _longer(shard: str, level: int) -> str:
    if level > len(Path(shard).parts):
        return shard
    name = "/".join(Path(shard).parts[-level:])
    ends = [suffix for suffix in TAR_SUFFIXES if name.lower().endswith(suffix)]
    return name[: -len(max(ends, key=len))] if ends else name


def files_below(
    folder: Path, left_out: LeftOut, skipped: Skipped | None = None, hidden: bool = False
) -> list[Path]:
    """All files below a folder, sorted, links followed; broken and special ones included.

    ``left_out`` receives hidden files, links back to a parent folder, and empty folders;
    ``skipped`` receives folders that cannot be listed.
    """
    note = left_out.at(str(folder))
    files: list[Path] = []
    waiting: list[tuple[Path, str, tuple[tuple[int, int], ...]]] = [(folder, "", ())]
    while waiting:
        place, relative, within = waiting.pop()
        try:
            stat = os.stat(place)
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            if skipped is None:
                raise
            skipped.record(f"{place}: {error.strerror or error}")
            continue
        identity = (stat.st_dev, stat.st_ino)
        if identity in within:
            note(f"{relative}: a link back to a folder that it is in")
            continue
        if not entries and relative:
            note(f"{relative}/: an empty folder")
        for entry in entries:
            name = f"{relative}/{entry.name}" if relative else entry.name
            if is_hidden(entry.name) and not hidden:
                note(f"{name}{'/' if _is_folder(entry) else ''}: hidden")
            elif _is_folder(entry):
                waiting.append((Path(entry.path), name, (*within, identity)))
            else:
                files.append(Path(entry.path))
    return sorted(files)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle of links
        return False


def problem_with_file(file: Path) -> str | None:
    """Why a path is not a file that can be read from start to end; None if it is one."""
    try:
        mode = os.stat(file).st_mode
    except FileNotFoundError:
        return "a broken link" if file.is_symlink() else "no such file"
    except OSError as error:
        return error.strerror or str(error)
    return None if S_ISREG(mode) else "not a plain file"


def read_bytes(file: Path, limit: int) -> bytes:
    """Content of an untrusted file; ValueError if it is not a plain file or exceeds ``limit``."""
    name = short(file, 1000)
    if problem := problem_with_file(file):
        raise ValueError(f"{name}: {problem}")
    try:
        if os.stat(file).st_size > limit:
            raise ValueError(f"{name}: more than the limit of {limit} bytes")
        return file.read_bytes()
    except OSError as error:
        raise OSError(f"{name}: {error.strerror or error}") from error
