"""Manifests: what a finished folder holds, and what made it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from memfree.folders.atomic_files import write_json
from memfree.folders.whole_folder import check_place
from memfree.untrusted import short

FORMAT_VERSION = 1
_FILES = {
    "dataset": r"(train|calibration|test|fit)-\d+\.tar|(items|conditions|records)\.parquet",
    "audit": r"audit\.parquet|index\.html",
    "evaluation": r"metrics\.json|(per_sample|trajectories|pictures)\.parquet|index\.html|"
    r"picture\.png|report",
    "tuning": r"tune\.json|guidance\.yaml",
}
"""Names of what is in a folder of a kind, beside its manifest and configuration."""
_PACKAGES = ("memfree", "torch", "torchvision", "lightning", "diffusers", "numpy")


def provenance(seed: int | None = None) -> dict[str, Any]:
    """What a manifest says of its making: command, package versions, commit, device, seed."""
    import torch

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
    """Commit of memfree's own checkout; None for an installed wheel, a copy, or without git.

    Git searches all parent folders for a repository: a wheel in a virtual environment inside
    somebody's project, or the sources copied into it, would report that project's commit.
    """
    package = Path(__file__).resolve().parents[1]
    root = _git(package, "rev-parse", "--show-toplevel")
    if root is None or package != Path(root, "src", "memfree").resolve():
        return None
    try:
        project = Path(root, "pyproject.toml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    if not re.search(r'^name\s*=\s*"memfree"', project, re.MULTILINE):
        return None
    return _git(package, "rev-parse", "HEAD")


def _git(folder: Path, *words: str) -> str | None:
    """What git prints for the repository that ``folder`` is in; None where it fails."""
    if not shutil.which("git"):
        return None
    # GIT_DIR and the like, which hooks set, would name another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    done = subprocess.run(
        ["git", "-C", str(folder), *words],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    return done.stdout.strip() or None if done.returncode == 0 else None


def _cpu_name() -> str:
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


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
    from memfree.untrusted import read_json, short

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
    """Refuse to replace what is not a finished folder of this ``kind``, or cannot be replaced.

    Raises:
        ValueError: ``out`` is a file, a folder with other contents or with files of the user's
            own beside the result, or a mount point.
        OSError: nothing can be written beside it.
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
        refuse_own_files(out, kind)
    check_place(out)


def refuse_own_files(out: Path, kind: str) -> None:
    """Refuse to replace a folder that holds what no command has written; hidden files go.

    Raises:
        ValueError: it does; the message names the first such file.
    """
    known = re.compile(rf"\..*|manifest\.json|config\.yaml|{_FILES.get(kind, '.*')}", re.DOTALL)
    own = sorted(path.name for path in out.iterdir() if not known.fullmatch(path.name))
    if own:
        more = f" and {len(own) - 1} more" if len(own) > 1 else ""
        raise ValueError(
            f"--out {out} also holds {short(own[0])}{more}, which would be lost: move it away, or "
            "choose another folder"
        )


def check_kind(folder: Path, kind: str) -> None:
    """Refuse a folder whose manifest is of another kind; without a manifest it may hold anything.

    Raises:
        ValueError: it holds something else, or a manifest that cannot be read.
    """
    if (folder / "manifest.json").is_file():
        read_manifest(folder, kind)
