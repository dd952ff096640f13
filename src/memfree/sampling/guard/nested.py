"""Arguments of a denoiser at any depth: some of their rows, and copies outside inference mode."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def rows_of(arguments: Any, rows: Tensor, count: int) -> Any:
    """The arguments for some rows: tensors with ``count`` rows are indexed, at any depth."""
    if isinstance(arguments, Tensor):
        if arguments.ndim and len(arguments) == count:
            return arguments[rows.to(arguments.device)]
        return arguments
    if isinstance(arguments, dict):
        return {name: rows_of(value, rows, count) for name, value in arguments.items()}
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(rows_of(value, rows, count) for value in arguments)
    return arguments


def usable(arguments: Any) -> Any:
    """The arguments outside of inference mode: tensors made inside it are copied."""
    if isinstance(arguments, Tensor):
        return arguments.clone() if arguments.is_inference() else arguments
    if isinstance(arguments, dict):
        return {name: usable(value) for name, value in arguments.items()}
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(usable(value) for value in arguments)
    return arguments
