"""Numbers in messages."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """``1 image``, ``2 images``: a number and what it counts; most nouns take an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {plural or noun + 's'}"
