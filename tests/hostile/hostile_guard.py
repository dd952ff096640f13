"""Read something hostile within limits of memory, and look at what it says and leaves behind."""

import resource
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from memfree.cli.errors import message_of

MEMORY = 1 << 30
"""Address space that a reader may take on top of what the process has, bytes."""
SECONDS = 20
"""Of computing, that a refusal may take."""


@contextmanager
def bounded():
    """Little memory inside; where the system does not say how much there is, as much as it has."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def one_line(error):
    """The message as a command prints it; fails if it is long, or not plain text on one line."""
    message = message_of(error)
    assert message.isprintable(), repr(message)
    assert 10 < len(message) < 700, message
    return message


def refused(read, *named):
    """The line with which ``read`` refuses its input; it has all of ``named`` in it."""
    start = time.process_time()
    with bounded(), pytest.raises((ValueError, OSError)) as caught:
        read()
    assert time.process_time() - start < SECONDS
    message = one_line(caught.value)
    for name in named:
        assert str(name) in message, message
    return message


def tree(folder):
    """All that is below a folder, with sizes."""
    return {str(path): path.lstat().st_size for path in folder.rglob("*")}
