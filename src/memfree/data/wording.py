"""Numbers in messages."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """``1 image``, ``2 images``: a number and what it counts, for nouns that take an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
