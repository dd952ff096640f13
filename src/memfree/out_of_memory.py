"""Out of memory: one line that says which options lower the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

_SIGNS = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")
"""Parts of torch's messages where the error has no type of its own (CPU, MPS, cuBLAS)."""


class ExplainedOutOfMemoryError(torch.OutOfMemoryError):
    """Memory ran out; the message is one line and names the options that lower it."""


@contextmanager
def explained_memory(doing: str, ways: Sequence[str]) -> Iterator[None]:
    """Raise ExplainedOutOfMemoryError where memory runs out within.

    Args:
        doing: what is done, as "training".
        ways: what lowers the memory, the best first, as "a smaller --batch_size (now 64)".
    """
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
    """Whether an error of torch or Python says that there is no memory left."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(sign in str(error) for sign in _SIGNS)
