"""What of two folders must be the same: everything but times and what a process measured."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import torch

TIMES = {"created", "seconds", "seconds_per_sample", "peak_memory_bytes"}
"""Names of values in manifests and samples that no two runs share."""


def contents(folder: Path, hidden: bool = True) -> dict[str, Any]:
    """Every file below ``folder`` by its name, and every empty folder.

    Args:
        folder: where.
        hidden: with files and folders whose name begins with a dot.
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not hidden and any(part.startswith(".") for part in name.split("/")):
            continue
        if path.is_dir():
            if not any(path.iterdir()):
                found[name] = "empty folder"
        elif path.suffix == ".json":
            found[name] = without_times(json.loads(path.read_text(encoding="utf-8")))
        elif path.name.startswith("samples-") and path.suffix == ".tar":
            found[name] = samples(path)
        elif path.suffix == ".ckpt":
            found[name] = plain(torch.load(path, weights_only=True))
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def samples(path: Path) -> dict[str, Any]:
    """Images and their JSON of a shard of samples."""
    found: dict[str, Any] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            data = tar.extractfile(member).read()
            is_json = member.name.endswith(".json")
            found[member.name] = without_times(json.loads(data)) if is_json else data
    return found


def without_times(value: Any) -> Any:
    """JSON without ``TIMES``; sizes of sample shards depend on how long these are written."""
    if isinstance(value, dict):
        sizes = value.get("kind") == "samples"
        return {
            name: without_times(one)
            for name, one in value.items()
            if name not in TIMES and not (sizes and name == "files")
        }
    return [without_times(one) for one in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """A checkpoint's values, tensors as their type, shape and bytes."""
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return [str(value.dtype), list(value.shape), hashlib.sha256(data).hexdigest()]
    if isinstance(value, dict):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value


def difference(expected: dict[str, Any], found: dict[str, Any]) -> str | None:
    """The first files that differ, or are in one only; None where all are the same."""
    names = [
        name
        for name in sorted({*expected, *found})
        if name not in expected or name not in found or expected[name] != found[name]
    ]
    if not names:
        return None
    told = []
    for name in names[:5]:
        if name not in found:
            told.append(f"{name} is missing")
        elif name not in expected:
            told.append(f"{name} is left over")
        else:
            told.append(f"{name}: {where(expected[name], found[name])}")
    return "; ".join(told)


def where(expected: Any, found: Any, name: str = "") -> str:
    """Where two nested values differ first."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in {**expected, **found}:
            if expected.get(key) != found.get(key):
                return where(expected.get(key), found.get(key), f"{name}.{key}")
    return f"{name} {str(expected)[:80]} / {str(found)[:80]}"
