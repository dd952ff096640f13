"""Settings of all tests: one thread a process, the longest files first, the slow tests marked."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; child processes inherit it
# Tiny networks gain nothing from more threads, and bits depend on their number.

from pathlib import Path

import pytest

LONGEST = ("tests/slurm", "tests/kill", "tests/integration", "tests/evaluation", "tests/hostile")
"""Folders that begin first (with ``--no-loadscope-reorder``), so that none is left for the end."""
SLOW_TESTS = Path(__file__).with_name("slow_tests.txt")
"""Tests and files that take long, without parameters; ``tests/slow_tests.py`` writes the list."""


def pytest_collection_modifyitems(items):
    """Mark the slow tests, and put the longest folders first."""
    slow = set(SLOW_TESTS.read_text().split())
    for item in items:
        if slow & {item.nodeid.split("[")[0], item.nodeid.split("::")[0]}:
            item.add_marker(pytest.mark.slow)

    def place(item):
        folders = [n for n, folder in enumerate(LONGEST) if item.nodeid.startswith(folder)]
        return folders[0] if folders else len(LONGEST)

    items.sort(key=place)
