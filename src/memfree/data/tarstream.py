"""WebDataset tars of others, read once from front to back, with limits and named errors."""

from __future__ import annotations

import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import braceexpand
from webdataset.gopen import gopen
from webdataset.tariterators import base_plus_ext

from memfree.data.decode import MAX_IMAGE_BYTES
from memfree.data.skipped import Skipped
from memfree.data.tarrecord import IMAGES, MAX_TEXT_BYTES, TEXTS, TarRecord, record_of
from memfree.untrusted import short

MAX_MEMBER_BYTES = 8 << 30
"""Largest member of any kind, bytes: what a tar without extensions can say."""
UNPACKED_FREE, UNPACKED_RATIO = 64 << 20, 200
"""A file may unpack to so many bytes, and so many times its own size."""

_SCHEME = r"([A-Za-z][A-Za-z0-9+.-]+):"
_SCHEMES = ("http", "https", "s3", "gs", "hf")
_EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_TAR_ERRORS = (
    tarfile.TarError,
    EOFError,
    ValueError,
    OverflowError,
    RecursionError,
    zlib.error,
    lzma.LZMAError,
)
_HEADER_ERRORS = (
    tarfile.EmptyHeaderError,  # type: ignore[attr-defined]
    tarfile.TruncatedHeaderError,  # type: ignore[attr-defined]
    tarfile.InvalidHeaderError,  # type: ignore[attr-defined]
)


class _StrictTarInfo(tarfile.TarInfo):
    """Header whose damage is an error: tarfile itself takes it for the archive's end."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _EXTENSIONS and header.size > MAX_TEXT_BYTES:  # tarfile would read it all
            raise OSError(f"extended header of {header.size} bytes")
        return header

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Any:
        try:
            header = super().fromtarfile(tarfile)
        except _HEADER_ERRORS as error:
            raise OSError("truncated or damaged archive") from error
        if not 0 <= header.size <= MAX_MEMBER_BYTES:  # tarfile would skip it in tiny steps
            raise OSError(f"damaged archive: member of {header.size} bytes")
        return header


def expand_shards(pattern: str, skipped: Skipped | None = None) -> list[str]:
    """Shards that a path or pattern names, sorted.

    Args:
        pattern: a folder of ``.tar`` files, one file, a glob, or addresses
            (``https://host/{00000..00099}.tar``; also s3, gs, hf), braces expanded.
        skipped: takes what braces name and is not there, instead of an error. Addresses are not
            looked up.

    Raises:
        FileNotFoundError: nothing matches, or some of what the braces name is not there.
        ValueError: an address that would run a command or is of an unknown kind.
    """
    found: list[str] = []
    absent: list[str] = []
    items = list(braceexpand.braceexpand(pattern))
    for item in items:
        if _is_address(item):
            found.append(item)
            continue
        if re.match(_SCHEME, item):
            raise ValueError(f"{item!r} is no shard address; use a path or {', '.join(_SCHEMES)}")
        local = _local_shards(item)
        found += local
        if not local:
            absent.append(item)
    if not found:
        raise FileNotFoundError(f"no tar shards at {pattern}")
    if absent and skipped is None:
        are = "is" if len(absent) == 1 else "are"
        raise FileNotFoundError(
            f"{len(absent)} of {len(items)} shards {are} missing, the first is {absent[0]}; "
            "on_error skip goes on without"
        )
    if skipped is not None:
        for item in absent:
            skipped.shard(item, f"shard {item} is missing")
    return found


def _is_address(item: str) -> bool:
    """Whether webdataset may open it: a known scheme, and nothing that a shell would read."""
    scheme = re.match(_SCHEME, item)
    known = scheme is not None and scheme.group(1).lower() in _SCHEMES
    return known and not re.search(r"[\s'\"`$;|<>]", item)


def _local_shards(item: str) -> list[str]:
    """Tars of a folder, one file, or what a glob matches."""
    path = Path(item)
    if path.is_dir():
        return sorted(str(tar) for tar in path.glob("*.tar*") if tar.is_file())
    if path.is_file():
        return [str(path)]
    anchor = Path(path.anchor) if path.is_absolute() else Path()
    relative = item[len(path.anchor) :] if path.is_absolute() else item
    return sorted(str(tar) for tar in anchor.glob(relative) if tar.is_file())


def read_shard(shard: str, skipped: Skipped | None = None) -> Iterator[TarRecord]:
    """Records of one shard in their order.

    Args:
        shard: path or address.
        skipped: takes what is wrong, instead of an error; a damaged archive is then left at that
            point.

    Raises:
        ValueError: a record is too large, has no image, or its class or JSON is unreadable.
        OSError: the archive cannot be opened, is truncated or damaged.
    """
    try:
        # webdataset would run what a file named "pipe:…" says: plain files are opened as files.
        with gopen(shard, "rb") if _is_address(shard) else open(shard, "rb") as stream:
            size = None if _is_address(shard) else os.fstat(stream.fileno()).st_size
            for name, members in _members(stream, shard, size):
                try:
                    record = record_of(name, members)
                except ValueError as error:
                    if skipped is None:
                        raise
                    skipped.record(str(error))
                    continue
                yield record
    except OSError as error:
        message = f"shard {shard}: {short(error)}"
        if skipped is None:
            raise OSError(message) from error
        skipped.shard(shard, message)


def _members(
    stream: IO[bytes], shard: str, packed: int | None
) -> Iterator[tuple[str, dict[str, bytes | str]]]:
    """(name, {suffix: content}) of each run of members with the same key."""
    base = Path(shard).name.split(".")[0]
    key, members = None, {}  # type: str | None, dict[str, bytes | str]
    for member, read in _files(stream, packed):
        found, suffix = base_plus_ext(member.name)
        if not found or not suffix:
            continue
        if found != key:
            if members:
                yield f"{base}/{short(key)}", members
            key, members = found, {}
        suffix = suffix.lower()
        if suffix not in IMAGES and suffix not in TEXTS:
            continue
        limit = MAX_TEXT_BYTES if suffix in TEXTS else MAX_IMAGE_BYTES
        if not member.isfile():
            members["error"] = f".{suffix} is a link or device, not a file"
        elif member.size > limit:
            members["error"] = f".{suffix} has {member.size} bytes, the limit is {limit}"
        elif not _is_plain(found):
            members["error"] = "its name is absolute, climbs with .. or has control characters"
        else:
            members[suffix] = read()
    if members:
        yield f"{base}/{short(key)}", members


def _is_plain(key: str) -> bool:
    """Whether a name could be a file below some folder, and be shown."""
    return key.isprintable() and not key.startswith("/") and ".." not in key.split("/")


def _files(
    stream: IO[bytes], packed: int | None
) -> Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]]:
    """(header, function that reads it) of each member but folders; all damage is an OSError.

    Args:
        stream: the archive.
        packed: bytes of its file, where they are known.
    """
    limit = None if packed is None else UNPACKED_FREE + UNPACKED_RATIO * packed
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictTarInfo) as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # would collect all headers
                if limit is not None and member.offset_data + member.size > limit:
                    raise OSError(f"it unpacks to more than {UNPACKED_RATIO} times its size")
                if not member.isdir():
                    yield member, partial(_content, archive, member)
    except _TAR_ERRORS as error:
        raise OSError(f"damaged archive ({error or type(error).__name__})") from error


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    try:
        file = archive.extractfile(member)
        assert file is not None
        return file.read()
    except _TAR_ERRORS as error:
        raise OSError(f"damaged archive ({error or type(error).__name__})") from error
