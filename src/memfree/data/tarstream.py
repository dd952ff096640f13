"""WebDataset tars of others, read once from front to back, with limits and named errors."""

from __future__ import annotations

import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import braceexpand
from webdataset.gopen import gopen
from webdataset.tariterators import base_plus_ext

from memfree.data.decode import MAX_IMAGE_BYTES, SUFFIXES
from memfree.data.skipped import Skipped

MAX_TEXT_BYTES = 1 << 20
"""Largest caption, class or JSON member that is read, bytes."""
MAX_LABEL = 99_999
"""Largest class number that is believed."""

_IMAGES = tuple(suffix[1:] for suffix in SUFFIXES)
_TEXTS = ("txt", "cls", "json")
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


@dataclass
class TarRecord:
    """One record of a foreign shard, not yet decoded."""

    name: str
    """Shard and key, for messages and as the image's key; never used as a file name."""
    image: bytes
    caption: str | None
    label: int | None
    image_key: str | None
    """Declared by our own shards."""
    group: str | None
    """Declared by our own shards."""


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
            return super().fromtarfile(tarfile)
        except _HEADER_ERRORS as error:
            raise OSError("truncated or damaged archive") from error


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
            for name, members in _members(stream, shard):
                try:
                    record = _record(name, members)
                except ValueError as error:
                    if skipped is None:
                        raise
                    skipped.record(str(error))
                    continue
                yield record
    except OSError as error:
        message = f"shard {shard}: {' '.join(str(error).split()) or type(error).__name__}"
        if skipped is None:
            raise OSError(message) from error
        skipped.shard(shard, message)


def _members(stream: IO[bytes], shard: str) -> Iterator[tuple[str, dict[str, bytes | str]]]:
    """(name, {suffix: content}) of each run of members with the same key."""
    base = Path(shard).name.split(".")[0]
    key, members = None, {}  # type: str | None, dict[str, bytes | str]
    for name, size, read in _files(stream):
        found, suffix = base_plus_ext(name)
        if not found or not suffix:
            continue
        if found != key:
            if members:
                yield f"{base}/{key}", members
            key, members = found, {}
        suffix = suffix.lower()
        if suffix not in _IMAGES and suffix not in _TEXTS:
            continue
        limit = MAX_TEXT_BYTES if suffix in _TEXTS else MAX_IMAGE_BYTES
        if size > limit:
            members["error"] = f".{suffix} has {size} bytes, the limit is {limit}"
        else:
            members[suffix] = read()
    if members:
        yield f"{base}/{key}", members


def _files(stream: IO[bytes]) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    """(name, bytes, function that reads it) of each plain file; all damage is an OSError."""
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictTarInfo) as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # would collect all headers
                if member.isfile():
                    yield member.name, member.size, partial(_content, archive, member)
    except _TAR_ERRORS as error:
        raise OSError(f"damaged archive ({error or type(error).__name__})") from error


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    try:
        file = archive.extractfile(member)
        assert file is not None
        return file.read()
    except _TAR_ERRORS as error:
        raise OSError(f"damaged archive ({error or type(error).__name__})") from error


def _record(name: str, members: dict[str, bytes | str]) -> TarRecord:
    if "error" in members:
        raise ValueError(f"{name}: {_text(members['error'])}")
    images = [members[suffix] for suffix in _IMAGES if suffix in members]
    if not images:
        raise ValueError(f"{name}: record without a PNG, JPEG or WEBP image")
    meta = _json(name, members.get("json", b"{}"))
    caption = meta.get("caption")
    if "txt" in members:
        caption = _text(members["txt"])
    label = meta.get("label")
    if "cls" in members:
        label = _text(members["cls"]).strip()
    return TarRecord(
        name,
        bytes(images[0]),  # type: ignore[arg-type]
        str(caption) if caption is not None else None,
        _label(name, label) if label is not None else None,
        _declared(meta, "image_key"),
        _declared(meta, "group"),
    )


def _text(data: bytes | str) -> str:
    return data.decode("utf-8", errors="replace") if isinstance(data, bytes) else data


def _json(name: str, data: bytes | str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: its .json is not valid JSON") from error
    return value if isinstance(value, dict) else {}


def _label(name: str, value: Any) -> int:
    try:
        label = int(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: class {value!r} is not a number") from error
    if not 0 <= label <= MAX_LABEL:
        raise ValueError(f"{name}: class {label} is not in 0..{MAX_LABEL}")
    return label


def _declared(meta: dict[str, Any], field: str) -> str | None:
    value = meta.get(field)
    return value if isinstance(value, str) and 0 < len(value) <= 1000 else None
