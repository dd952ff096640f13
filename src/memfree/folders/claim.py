"""Claim of an output folder: whether it may be written, resumed, or holds something else.

Data sets, indexes, evaluations, audits, tunings and small networks are put in place when they are
complete, and what was there is lost: ``claim`` answers for those. Models, samples, studies, the
demo and pages are filled in place, beside what else is there: their commands call ``check_kind``
and, for what only they know of (checkpoints, shards, the numbers of a study), ``refuse_other``.
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
"""``finished``: what is asked for is there; ``open``: it may be written, or replaced; ``other``: it
is filled in place, and holds another one that must be deleted first."""

HASH = "_sha256"
_FILES = {
    "dataset": r"(train|calibration|test|fit)-\d+\.tar|(items|conditions|records)\.parquet",
    "audit": r"audit\.parquet|index\.html",
    "evaluation": r"metrics\.json|(per_sample|trajectories|pictures)\.parquet|index\.html|"
    r"picture\.png|report",
    "tuning": r"tune\.json|guidance\.yaml",
}
"""Names of what is in a folder of a kind, beside its manifest and configuration."""


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
        kind: what is to be there, as in its manifest.
        identity: all that the result depends on, JSON values. None: what is there of this kind is
            replaced, whatever it was made from.
        overwrite: whether one of another identity may be replaced; None where there is no such
            option.
        identity_of: the identity in a manifest of this kind.

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
    """The manifest of a folder of this kind; empty where there is none, whatever else is there."""
    _refuse_file(out)
    if not (out / "manifest.json").is_file():
        return {}
    with or_another():
        return read_manifest(out, kind)


def refuse_other(out: Path, difference: str | None, overwrite: bool | None = None) -> None:
    """Refuse a folder that holds something else, unless ``overwrite``; name the ways out."""
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
    """Add "use another --out" to what is wrong with a file that says what a folder holds."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; use another --out") from error


def first_difference(present: Any, wanted: Any, name: str = "") -> str | None:
    """Where two nested dicts of JSON values differ first, None where they are equal.

    An absent value equals None. Of a value whose name ends in ``_sha256`` only that it differs is
    said. ``name``: of the two values, dotted.
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
