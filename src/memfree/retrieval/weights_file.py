"""What goes wrong when weights of other people are read, as one line."""

from __future__ import annotations

import pickle

import safetensors

from memfree.untrusted import short

UNREADABLE = (
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    AssertionError,
    pickle.UnpicklingError,
    safetensors.SafetensorError,
)
"""What libraries raise for a file that holds no weights, or weights of another model."""


def last_line(error: BaseException) -> str:
    """The first line of a message that says something, without code marks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return short(" ".join(lines[:2]) or type(error).__name__, 300)
