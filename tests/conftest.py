"""One thread a process: tiny networks gain nothing from more, and bits depend on their number."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; child processes inherit it
