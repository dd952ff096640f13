"""Reader of third-party WebDataset tars: limits, named errors, nothing left out silently.

webdataset's own reader takes a damaged header for the end of the archive, and has no limits.
"""

from __future__ import annotations

import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import braceexpand
from webdataset.gopen import gopen

from memfree.data.file_names import (
    is_hidden,
    is_tar,
    problem_with,
    problem_with_file,
    shard_labels,
    split_name,
)
from memfree.data.options import RecordOptions
from memfree.data.skipped import LeftOut, Skipped, skipping
from memfree.data.tar_record import MAX_TEXT_BYTES, TEXTS, Member, TarRecord, is_wanted, record_of
from memfree.folders.untrusted import short
from memfree.images import MAX_IMAGE_BYTES

MAX_MEMBER_BYTES = 8 << 30
"""Largest member of any kind, bytes: the limit of tar without extensions."""
UNPACKED_FREE, UNPACKED_RATIO = 64 << 20, 200
"""A file may unpack to this many bytes, and to this many times its own size."""

_DEFAULT_OPTIONS = RecordOptions()
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")  # gzip, bzip2, xz: cannot be read in any order
_PADDING = 1 << 20  # bytes after an archive's end that are looked at
_SCHEME = r"([A-Za-z][A-Za-z0-9+.-]+):"
_SCHEMES = ("http", "https", "s3", "gs", "hf")
_EXTENSIONS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_TAR_ERRORS = (
    *(tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError),
    *(zlib.error, lzma.LZMAError),
)
_HEADER_ERRORS = (
    tarfile.EmptyHeaderError,  # type: ignore[attr-defined]
    tarfile.TruncatedHeaderError,  # type: ignore[attr-defined]
    tarfile.InvalidHeaderError,  # type: ignore[attr-defined]
)


def expand_shards(
    pattern: str, skipped: Skipped | None = None, left_out: LeftOut | None = None
) -> list[str]:
    """Sorted shards of a folder of tars, a file, a glob, or addresses with braces (not checked).

    ``skipped`` receives missing files of a brace pattern, ``left_out`` files that are no tars.
    """
    shards: list[str] = []
    absent: list[str] = []
    others: list[str] = []
    for item in braceexpand.braceexpand(pattern):
        if _is_address(item):
            shards.append(item)
            continue
        if re.match(_SCHEME, item):
            raise ValueError(
                f"{item!r} is not a shard address; use a path or {', '.join(_SCHEMES)}"
            )
        tars, broken, rest = _local_shards(item)
        shards += tars
        others += rest
        absent += broken or ([] if tars else [item])
    if not shards:
        beside = f"; beside others, {short(others[0])}" if others else ""
        raise FileNotFoundError(f"no tar shards at {pattern}{beside}")
    if absent and skipped is None:
        are = "is" if len(absent) == 1 else "are"
        raise FileNotFoundError(
            f"{len(absent)} of {len(shards) + len(absent)} shards {are} missing, the first is "
            f"{_why_absent(absent[0])}; on_error skip continues without"
        )
    for item in absent:
        assert skipped is not None
        skipped.shard(item, f"shard {_why_absent(item)} is missing")
    if left_out is not None:
        note = left_out.at(pattern)
        for item in dict.fromkeys(others):
            note(item)
    return shards


def _why_absent(item: str) -> str:
    path = Path(item)
    reason = problem_with_file(path) if path.is_symlink() or path.exists() else None
    return f"{item} ({reason})" if reason else item


def _is_address(item: str) -> bool:
    """Whether webdataset may open it: a known scheme and no shell characters."""
    scheme = re.match(_SCHEME, item)
    known = scheme is not None and scheme.group(1).lower() in _SCHEMES
    return known and not re.search(r"[\s'\"`$;|<>]", item)


def _local_shards(item: str) -> tuple[list[str], list[str], list[str]]:
    path = Path(item)
    if path.is_file():
        return [item if item == str(path) else str(path)], [], []
    if path.is_dir():
        matches = sorted(path.iterdir())
    else:
        matches = sorted(Path(path.anchor).glob(item[len(path.anchor) :]))
    tars: list[str] = []
    broken: list[str] = []
    others: list[str] = []
    for file in matches:
        if not is_tar(file.name) or is_hidden(file.name) or file.is_dir():
            others.append(f"{file}/" if file.is_dir() else str(file))
        else:
            (broken if problem_with_file(file) else tars).append(str(file))
    if not tars and not path.is_dir():  # a glob of the user's own, for files of other names
        tars = [str(file) for file in matches if problem_with_file(file) is None]
        others = [name for name in others if name not in tars]
    return tars, broken, others


def read_shard(
    shard: str,
    skipped: Skipped | None = None,
    left_out: LeftOut | None = None,
    options: RecordOptions = _DEFAULT_OPTIONS,
    prefix: str = "--records.",
    label: str | None = None,
) -> Iterator[TarRecord]:
    """Records of one shard in their order, called by ``label`` (default: the shard's name).

    Files of one sample may be scattered in a plain tar on disk, not in a compressed or remote one,
    which is read from front to back. ``skipped`` receives errors instead of raising them; a damaged
    archive ends there, a scattered remote shard is refused all the same. ``left_out`` receives
    members that belong to no record.
    """
    label = shard_labels([shard])[0] if label is None else label
    note = _note(left_out, shard, label)
    samples = 0
    with _named(shard, skipped):
        if skipped is not None and not _is_address(shard):
            _refuse_scattered(shard, options)
        with _opened(shard) as archive:
            members = _members(archive, options, note)
            read = _gathered(members) if archive.plain else _runs(members, options)
            for key, parts in read:
                samples += 1
                with skipping(skipped, ValueError):
                    yield record_of(f"{label}/{key}", parts, options, prefix, note)
        if not samples:
            note("no record in it")


def read_members(
    shard: str,
    wanted: Callable[[str], bool],
    limit: int,
    skipped: Skipped | None = None,
    left_out: LeftOut | None = None,
    label: str | None = None,
) -> Iterator[tuple[str, bytes]]:
    """(name, content) of ``wanted`` files up to ``limit`` bytes; see :func:`read_shard`."""
    label = shard_labels([shard])[0] if label is None else label
    note = _note(left_out, shard, label)
    names: set[str] = set()
    with _named(shard, skipped), _opened(shard) as archive:
        for info in archive:
            if not wanted(info.name):
                note(info.name)
                continue
            with skipping(skipped, ValueError):
                if problem := _problem(info, limit):
                    raise ValueError(f"{label}/{short(info.name)}: {problem}")
                name = split_name(info.name, "last_dot")[0]
                name = info.name if name in names else name
                names.add(name)
                yield f"{label}/{name}", archive.read(info)


def _note(left_out: LeftOut | None, shard: str, label: str) -> Callable[[str], None]:
    note = (left_out if left_out is not None else LeftOut()).at(shard)
    return lambda what: note(f"{label}/{what}")


class _ScatteredError(OSError):
    """Files of a sample do not stand together."""


@contextmanager
def _named(shard: str, skipped: Skipped | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"shard {shard}: {short(error)}"
        # A scattered remote shard has already yielded pictures without their later captions.
        scattered = isinstance(error, _ScatteredError) and _is_address(shard)
        if skipped is None or scattered:
            raise OSError(message) from error
        skipped.shard(shard, message)


def _refuse_scattered(shard: str, options: RecordOptions) -> None:
    """With ``skipped``, pictures would otherwise lose captions that stand behind them."""
    try:
        with _opened(shard) as archive:
            if not archive.plain:
                members = _members(archive, options, lambda name: None)
                for _ in _runs(members, options, contents=False):
                    pass
    except OSError as error:  # other damage is met again as the shard is read
        if isinstance(error, _ScatteredError):
            raise


def _members(
    archive: _Archive, options: RecordOptions, note: Callable[[str], None]
) -> Iterator[tuple[str, Member | None]]:
    ends: Any = "last_dot" if options.key_ends == "last_dot" else "first_dot"
    for info in archive:
        key, suffix = split_name(info.name, ends)
        if is_hidden(info.name):
            note(f"{info.name}: hidden")
            yield key, None
        elif is_wanted(suffix) or suffix == options.suffix():
            problem = _problem(info, MAX_TEXT_BYTES if suffix in TEXTS else MAX_IMAGE_BYTES)
            problem = f".{short(suffix, 40)} {problem}" if problem else None
            yield key, Member(info.name, suffix, partial(archive.read, info), problem)
        else:
            note(info.name)
            yield key, None


def _gathered(
    members: Iterator[tuple[str, Member | None]],
) -> Iterator[tuple[str, list[Member]]]:
    samples: dict[str, list[Member]] = {}
    damage: OSError | None = None
    last = None
    try:
        for last, member in members:
            if member is not None:
                samples.setdefault(last, []).append(member)
    except OSError as error:
        damage = error
    for key, parts in samples.items():
        if damage is not None and key == last:  # the rest of it may be lost
            break
        yield key, parts
    if damage is not None:
        raise damage


def _runs(
    members: Iterator[tuple[str, Member | None]], options: RecordOptions, contents: bool = True
) -> Iterator[tuple[str, list[Member]]]:
    run_key: str | None = None
    run: list[Member] = []
    ended: set[str] = set()
    for key, member in members:
        if member is None:
            continue
        if key != run_key:
            if run_key is not None:
                yield run_key, run
                ended.add(run_key)
            if key in ended:
                raise _ScatteredError(
                    f"the files of sample {short(key)} do not stand together; sort the tar by "
                    "name, or keep it unpacked on a disk"
                )
            run_key, run = key, []
        is_used = "." not in member.suffix or member.suffix == options.suffix()
        if contents and member.problem is None and is_used:
            member.read = partial(bytes, member.read())
        run.append(member)
    if run_key is not None:
        yield run_key, run


def _problem(info: tarfile.TarInfo, limit: int) -> str | None:
    if not info.isfile():
        return "is a link or device, not a file"
    if info.size > limit:
        return f"has {info.size} bytes, the limit is {limit}"
    name = problem_with(info.name)
    return f"cannot be used: its name {name}" if name else None


class _StrictTarInfo(tarfile.TarInfo):
    """Raises on a damaged header, which tarfile takes for the archive's end."""

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


@contextmanager
def _damage() -> Iterator[None]:
    """Turn errors of tarfile and decompressors into OSError."""
    try:
        yield
    except _TAR_ERRORS as error:
        raise OSError(f"damaged archive ({error or type(error).__name__})") from error


class _Archive:
    def __init__(self, tar: tarfile.TarFile, limit: float, plain: bool) -> None:
        self._tar = tar
        self._limit = limit  # bytes that it may unpack to
        self.plain = plain  # can be read in any order

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        with _damage():
            while (member := self._tar.next()) is not None:
                self._tar.members = []  # type: ignore[attr-defined]  # would collect all headers
                if member.offset_data + member.size > self._limit:
                    raise OSError(f"it unpacks to more than {UNPACKED_RATIO} times its size")
                if not member.isdir():
                    yield member
            rest = self._tar.fileobj.read(_PADDING)  # type: ignore[union-attr]
        if rest.strip(b"\0"):
            raise OSError(
                "continues after its end; unpack tars that were joined, and pack them anew"
            )

    def read(self, member: tarfile.TarInfo) -> bytes:
        """Content of a member; in a stream only that of the last header."""
        with _damage():
            file = self._tar.extractfile(member)
            assert file is not None
            return file.read()


@contextmanager
def _opened(shard: str) -> Iterator[_Archive]:
    # webdataset would execute a file named "pipe:…": open plain files as files.
    remote = _is_address(shard)
    if not remote and (problem := problem_with_file(Path(shard))):
        raise OSError(problem)
    with gopen(shard, "rb") if remote else open(shard, "rb") as stream:
        limit, plain = float("inf"), False
        if not remote:
            limit = UNPACKED_FREE + UNPACKED_RATIO * os.fstat(stream.fileno()).st_size
            plain = not stream.peek(8).startswith(_PACKED)
        mode: Any = "r:" if plain else "r|*"
        with _damage():
            tar = tarfile.open(  # noqa: SIM115 - closed below
                fileobj=stream, mode=mode, tarinfo=_StrictTarInfo, encoding="utf-8"
            )
        with tar:
            yield _Archive(tar, limit, plain)
