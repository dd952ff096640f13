"""Claim of an output folder: whether it may be written, resumed, or holds something else."""

from __future__ import annotations

from typing import Any

HASH = "_sha256"


def first_difference(found: Any, wanted: Any, name: str = "") -> str | None:
    """Say where two nested dicts of JSON values differ first, None where they are equal.

    An absent value equals None. Of a value whose name ends in ``_sha256`` only that it is another
    is said.

    Args:
        found: what a folder holds.
        wanted: what the command asks for.
        name: of the two values, dotted.
    """
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            path = f"{name}.{key}" if name else str(key)
            difference = first_difference(found.get(key), wanted.get(key), path)
            if difference:
                return difference
        return None
    if found == wanted:
        return None
    if name.endswith(HASH):
        return f"made with another {name.removesuffix(HASH)}"
    return f"{name or 'it'} is {_short(found)} there and {_short(wanted)} here"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 24 else f"{text[:20]}..."
