"""Manifests and saved configurations: what a folder holds, who made it, with which options."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from typing import Any

from memfree.folders.atomic import write_json, write_text
from memfree.folders.untrusted import check_plain, named, read_json, short
from memfree.slurm.launcher import is_first_process

_BLOCK, _CHUNK = 64 << 20, 1 << 20  # bytes


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file; refuses a FIFO or device, which may never end."""
    check_plain(path)
    digest = hashlib.sha256()
    with named(path), open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def block_checksums(path: Path) -> list[int]:
    """CRC-32 of each 64 MiB, in threads: finds damage, not forgery; 4 times as fast as SHA-256."""
    check_plain(path)

    def checksum(start: int) -> int:
        value = 0
        with named(path), open(path, "rb") as file:  # buffered: a read is never short
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


FORMAT_VERSION = 1
_PACKAGES = ("memfree", "torch", "torchvision", "lightning", "diffusers", "numpy")


def provenance(seed: int | None = None) -> dict[str, Any]:
    """Manifest fields on how a folder was written: command, versions, commit, device, seed."""
    import torch

    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "git_commit": _git_commit(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "seed": seed,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _git_commit() -> str | None:
    """Commit of memfree's own checkout; None for an installed wheel, a copy, or without git.

    Git searches parent folders: in somebody's project it would report that project's commit.
    """
    package = Path(__file__).resolve().parents[1]
    root = Path(_git(package, "rev-parse", "--show-toplevel") or "/")
    try:
        project = (root / "pyproject.toml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    is_own = package == (root / "src" / "memfree").resolve()
    if not is_own or not re.search(r'^name\s*=\s*"memfree"', project, re.MULTILINE):
        return None
    return _git(package, "rev-parse", "HEAD")


def _git(folder: Path, *words: str) -> str | None:
    if not shutil.which("git"):
        return None
    # GIT_DIR and the like, which hooks set, would name another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-C", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return done.stdout.strip() or None if done.returncode == 0 else None


def write_manifest(folder: Path, kind: str, seed: int | None = None, **fields: Any) -> None:
    """Write ``folder/manifest.json``, the last file of a finished folder.

    ``kind`` such as ``dataset``; ``seed`` None if nothing is random; ``fields`` JSON values.
    """
    value = {"format": FORMAT_VERSION, "kind": kind, **fields, "made_by": provenance(seed)}
    write_json(folder / "manifest.json", value)


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """Manifest of a finished folder of this ``kind``; else FileNotFoundError or ValueError."""
    path = folder / "manifest.json"
    if not folder.is_dir():
        raise FileNotFoundError(f"no {kind} folder at {folder}")
    if not path.is_file():
        raise ValueError(f"{folder} is not a finished {kind} folder: it has no manifest.json")
    value = read_json(path)
    if not isinstance(value, dict) or value.get("kind") != kind:
        held = value.get("kind") if isinstance(value, dict) else type(value).__name__
        article = "an" if kind[0] in "aeiou" else "a"
        raise ValueError(f"{folder} holds {short(repr(held))}, not {article} {kind} folder")
    if value.get("format") != FORMAT_VERSION:
        held = short(repr(value.get("format")))
        raise ValueError(f"{folder} has format {held}; this version reads {FORMAT_VERSION}")
    return value


CONFIG_NAME = "config.yaml"

_resolved: ContextVar[str | None] = ContextVar("resolved", default=None)


@contextmanager
def resolved_config(text: str) -> Iterator[None]:
    """Let ``save_config`` write ``text`` (YAML) inside this context."""
    token = _resolved.set(text)
    try:
        yield
    finally:
        _resolved.reset(token)


def save_config(folder: Path) -> None:
    """Write ``folder/config.yaml``, which replays the running command with ``--config``.

    Call once ``folder`` is accepted and being written, never if it is finished already. Does
    nothing when called from Python, nor in any process but the first.
    """
    text = _resolved.get()
    if text is not None and is_first_process():
        write_text(folder / CONFIG_NAME, text)
