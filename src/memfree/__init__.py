"""Induce, measure and remove the memorization of training images in diffusion models."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "GuidanceSettings": "memfree.guidance",
    "ReferenceIndex": "memfree.retrieval",
    "audit": "memfree.commands.audit",
    "guard": "memfree.pipeline_guard",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: some take seconds."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'memfree' has no attribute {name!r}")


def with_moved_names(
    package: str, attribute: Callable[[str], Any] | None, moved: Mapping[str, str]
) -> Callable[[str], Any]:
    """A package's ``__getattr__`` that finds moved names, with a warning, for one release."""

    def get(name: str) -> Any:
        if name not in moved:
            if attribute is None:
                raise AttributeError(f"module {package!r} has no attribute {name!r}")
            return attribute(name)
        message = f"{package}.{name} has moved: import it from {moved[name]}"
        warnings.warn(message, FutureWarning, stacklevel=2)
        return getattr(importlib.import_module(moved[name]), name)

    return get
