"""Whether this process is the one that writes what several write once."""

from __future__ import annotations

import os


def is_first_process() -> bool:
    """Whether this is the only process, or the first of those that a launcher started."""
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name]) == 0
    # Lightning's own launcher: the first process of a further machine knows its NODE_RANK only.
    return all(int(os.environ.get(name, 0)) == 0 for name in ("LOCAL_RANK", "NODE_RANK"))
