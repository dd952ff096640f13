"""SHA-256 of files and of folders, and checksums that are fast enough for gigabytes."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memfree.untrusted import check_plain

_BLOCK, _CHUNK = 64 << 20, 1 << 20  # bytes


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is a FIFO or device, which may have no end.
    """
    check_plain(path)
    with _named(path), open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _sha256_chunks(file)
        )


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say which file the disk did not give: an error of reading, as of a bad sector, does not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(f"{path} cannot be read: {error.strerror}") from error


def _sha256_chunks(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def block_checksums(path: Path) -> list[int]:
    """CRC-32 of every 64 MiB of a file, read by as many threads as there are cores.

    They find damage, not forgery, at about the speed of a disk: four times that of SHA-256.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a FIFO or device, which may have no end.
    """
    check_plain(path)

    def checksum(start: int) -> int:
        value = 0
        with _named(path), open(path, "rb") as file:  # buffered: a read is never short
            file.seek(start)
            for _ in range(_BLOCK // _CHUNK):
                value = zlib.crc32(file.read(_CHUNK), value)
        return value

    starts = range(0, path.stat().st_size, _BLOCK)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, max(len(starts), 1))) as threads:
        return list(threads.map(checksum, starts))


def folder_hash(folder: Path) -> str:
    """SHA-256 over names and contents of a folder's files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = [[path.relative_to(folder).as_posix(), sha256(path)] for path in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
