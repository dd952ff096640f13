"""Manifests and atomic files: what made a folder, and that nothing half-written counts as whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from memfree.untrusted import read_json, short

FORMAT_VERSION = 1
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
"""Names of ``write_atomic``."""
_PACKAGES = ("memfree", "torch", "torchvision", "lightning", "diffusers", "numpy")


def provenance(seed: int | None = None) -> dict[str, Any]:
    """What a manifest says of its making: command, package versions, commit, device, seed."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "git_commit": _git_commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "seed": seed,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _git_commit() -> str | None:
    """Commit of the source checkout, None for an installed wheel or without git."""
    found = (
        subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
        if shutil.which("git")
        else None
    )
    return found.stdout.strip() if found is not None and found.returncode == 0 else None


def _cpu_name() -> str:
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` on a temporary name beside ``path``, flush it to disk, then rename it.

    Whatever happens, ``path`` holds the old content or the new, whole; after the call the new one
    survives a loss of power, and so do the folders that had to be made for it.
    """
    _make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    """Make a folder and those that it is in, and flush their names."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to the disk."""
    try:
        opened = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():  # Windows opens no folders
            return
        raise
    try:
        os.fsync(opened)
    except OSError as error:
        # Some network file systems flush no folders.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


def remove_temporary(folder: Path) -> None:
    """Remove what killed processes left of ``write_atomic`` in ``folder`` and two levels below.

    Nobody else may be writing there.
    """
    for level in (".*.tmp", "*/.*.tmp", "*/*/.*.tmp"):
        for path in folder.glob(level):
            if _TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN and infinities are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(path, write)


def write_manifest(folder: Path, kind: str, seed: int | None = None, **fields: Any) -> None:
    """Write ``folder/manifest.json``, the last file of a finished folder.

    Args:
        folder: the folder that is now complete.
        kind: what it holds: ``dataset``, ``model``, ``index``, ``samples``, ``evaluation``,
            ``report``, ``audit``, ``tuning``, ``study`` or ``demo``.
        seed: seed of the run, None where nothing random happened.
        fields: what else a reader needs, JSON values.
    """
    value = {"format": FORMAT_VERSION, "kind": kind, **fields, "made_by": provenance(seed)}
    write_json(folder / "manifest.json", value)


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """Read the manifest of a finished folder of this ``kind``.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is unfinished, of another kind, of a newer format, or not valid JSON.
    """
    path = folder / "manifest.json"
    if not folder.is_dir():
        raise FileNotFoundError(f"no {kind} folder at {folder}")
    if not path.is_file():
        raise ValueError(f"{folder} is not a finished {kind} folder: it has no manifest.json")
    value = read_json(path)
    if not isinstance(value, dict) or value.get("kind") != kind:
        found = value.get("kind") if isinstance(value, dict) else type(value).__name__
        article = "an" if kind[0] in "aeiou" else "a"
        raise ValueError(f"{folder} holds {short(repr(found))}, not {article} {kind} folder")
    if value.get("format") != FORMAT_VERSION:
        found = short(repr(value.get("format")))
        raise ValueError(f"{folder} has format {found}; this version reads {FORMAT_VERSION}")
    return value


def check_replaceable(out: Path, kind: str) -> None:
    """Refuse to replace what is not a finished folder of this ``kind``.

    Raises:
        ValueError: ``out`` is a file, or a folder with other contents.
    """
    if out.is_file():
        raise ValueError(f"--out {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()):
        try:
            read_manifest(out, kind)
        except ValueError as error:
            raise ValueError(
                f"--out {out} holds files of something else ({error}); "
                "choose an empty or a new folder"
            ) from error


def check_kind(folder: Path, kind: str) -> None:
    """Refuse a folder whose manifest is of another kind; without a manifest it may hold anything.

    Raises:
        ValueError: it holds something else, or a manifest that cannot be read.
    """
    if (folder / "manifest.json").is_file():
        read_manifest(folder, kind)


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _sha256_chunks(file)
        )


def _sha256_chunks(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


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


def folder_hash(folder: Path) -> str:
    """SHA-256 over names and contents of a folder's files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = [[path.relative_to(folder).as_posix(), sha256(path)] for path in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
