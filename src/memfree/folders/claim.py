"""Claim of an output folder: whether it may be written, resumed, or holds something else.

``claim`` is for folders put in place when complete (what was there is lost). Folders filled in
place (models, samples, studies, the demo, pages) use ``check_kind`` and ``refuse_other``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

from memfree.folders.atomic import check_place
from memfree.folders.manifest import read_manifest
from memfree.folders.untrusted import short

Found: TypeAlias = Literal["open", "finished", "other"]
"""``finished``: already there; ``open``: may be written or replaced; ``other``: filled in place,
holds another one that must be deleted first."""

HASH = "_sha256"
_FILES = {
    "dataset": r"(train|calibration|test|fit)-\d+\.tar|(items|conditions|records)\.parquet",
    "audit": r"audit\.parquet|index\.html",
    "evaluation": r"metrics\.json|(per_sample|trajectories|pictures)\.parquet|index\.html|"
    r"picture\.png|report",
    "tuning": r"tune\.json|guidance\.yaml",
}


def claim(
    out: Path,
    kind: str,
    identity: dict[str, Any] | None = None,
    overwrite: bool | None = None,
    identity_of: Callable[[dict[str, Any]], Any] = lambda manifest: manifest.get("identity"),
) -> Found:
    """Accept ``out`` as the place of a folder that is put there when complete; writes nothing.

    Args:
        out: the folder, which need not exist.
        kind: as in its manifest.
        identity: all that the result depends on, JSON values; None: replace any result of this
            kind.
        overwrite: replace one of another identity; None if there is no such option.
        identity_of: reads the identity from a manifest of this kind.

    Raises:
        ValueError: it holds something else or the user's own files, or is a file or a mount point.
        OSError: nothing can be written beside it.
    """
    manifest = check_kind(out, kind)
    if not manifest:
        refuse_files(out)
    elif identity is not None:
        difference = first_difference(identity_of(manifest), identity)
        if not difference:
            return "finished"
        refuse_other(out, difference, overwrite)
    if kind in _FILES:  # hidden files go with the folder
        refuse_files(out, rf"\..*|manifest\.json|config\.yaml|{_FILES[kind]}")
    check_place(out)
    return "open"


def check_kind(out: Path, kind: str) -> dict[str, Any]:
    """Manifest of a folder of this kind; empty if there is none, whatever else is there."""
    _refuse_file(out)
    if not (out / "manifest.json").is_file():
        return {}
    with or_another():
        return read_manifest(out, kind)


def refuse_other(out: Path, difference: str | None, overwrite: bool | None = None) -> None:
    """Refuse a folder with other content unless ``overwrite``; name the ways out."""
    if difference and not overwrite:
        delete = "" if overwrite is None else ", or --overwrite true to delete it"
        raise ValueError(
            f"--out {out} holds something else: {difference}; use another --out{delete}"
        )


def refuse_files(out: Path, known: str = "") -> None:
    """Refuse a folder with a file whose name the regular expression ``known`` does not match."""
    _refuse_file(out)
    names = (path.name for path in out.iterdir()) if out.is_dir() else ()
    if own := sorted(name for name in names if not re.fullmatch(known, name, re.DOTALL)):
        refuse_other(out, short(own[0]) + (f" and {len(own) - 1} more" if own[1:] else ""))


def _refuse_file(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")


@contextmanager
def or_another() -> Iterator[None]:
    """Append "use another --out" to an error in a file that says what a folder holds."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; use another --out") from error


def first_difference(present: Any, wanted: Any, name: str = "") -> str | None:
    """First difference of two nested JSON dicts, None if equal; absent equals None.

    ``name``: dotted name of both values. Values of ``*_sha256`` are not shown.
    """
    if isinstance(present, dict) and isinstance(wanted, dict):
        for key in [*wanted, *(key for key in present if key not in wanted)]:
            path = f"{name}.{short(key)}" if name else short(key)
            if difference := first_difference(present.get(key), wanted.get(key), path):
                return difference
        return None
    if present == wanted:
        return None
    if name.endswith(HASH):
        return f"made with another {name.removesuffix(HASH)}"
    there, here = (
        text if len(text) <= 24 else f"{text[:20]}..." for text in (repr(present), repr(wanted))
    )
    return f"{name or 'it'} is {there} there and {here} here"
