"""Keeps Lightning's tips and its advice to developers off the user's screen."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

SRUN_UNUSED = "The .srun. command is available.*"
"""What Lightning says wherever SLURM is installed and not used."""


@contextmanager
def quiet(*patterns: str) -> Iterator[None]:
    """Silence Lightning's information lines, and warnings that match any of the patterns."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for pattern in (".*LeafSpec.*", SRUN_UNUSED, *patterns):
            warnings.filterwarnings("ignore", pattern)
        try:
            yield
        finally:
            log.setLevel(level)
