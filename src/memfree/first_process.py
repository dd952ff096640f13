"""Whether this process is the one that writes what several write once."""

from __future__ import annotations

import os


def is_first_process() -> bool:
    """Whether this is the only process, or the first of those that a launcher started."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"]) == 0
    # Lightning's own launcher: the first process of a further machine knows its NODE_RANK only,
    # and what it starts inside a SLURM allocation has the SLURM_PROCID of the process itself.
    names = ("SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
    return all(int(os.environ.get(name, 0)) == 0 for name in names)
