"""Out-of-memory errors as one line that names the options that lower the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

_SIGNS = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")
"""Parts of torch's messages for errors without a type of their own (CPU, MPS, cuBLAS)."""


class ExplainedOutOfMemoryError(torch.OutOfMemoryError):
    """Out of memory, in one line that names the options that lower it."""


@contextmanager
def explained_memory(doing: str, ways: Sequence[str]) -> Iterator[None]:
    """Explain running out of memory while ``doing`` something; ``ways`` lower it, best first."""
    try:
        yield
    except ExplainedOutOfMemoryError:
        raise
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        none_left = "no option lowers it further: use smaller images or a device with more memory"
        advice = f"give {', or '.join(ways)}" if ways else none_left
        raise ExplainedOutOfMemoryError(f"out of memory while {doing}: {advice}") from error


def ran_out(error: Exception) -> bool:
    """Whether an error of torch or Python means out of memory."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(sign in str(error) for sign in _SIGNS)
