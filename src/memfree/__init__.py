"""Induce, measure and remove the memorization of training images in diffusion models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memfree.sampling.guard import guard as guard

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``memfree.guard``, imported at its first use: it takes seconds."""
    if name == "guard":
        from memfree.sampling.guard import guard

        return guard
    raise AttributeError(f"module 'memfree' has no attribute {name!r}")
