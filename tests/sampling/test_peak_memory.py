from pathlib import Path

import pytest
import torch

import memfree.sampling.writer as peak_memory_module
from memfree.sampling.writer import peak_memory, reset_peak_memory

CPU = torch.device("cpu")
SIZE = 200_000_000


STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def system_peak() -> int:
    """VmHWM of this process in bytes, 0 where the system does not say."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def system_forgets() -> bool:
    """Whether this system starts VmHWM again when it is asked to: some containers do not."""
    held = torch.ones(SIZE, dtype=torch.uint8)
    before = system_peak()
    del held
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return system_peak() < before - SIZE / 2


def test_the_peak_is_of_what_came_after_the_reset():
    if not system_forgets():
        pytest.skip("this system does not forget a process's peak memory")
    held = torch.ones(SIZE, dtype=torch.uint8)
    before = peak_memory(CPU)
    del held
    reset_peak_memory(CPU)
    after = peak_memory(CPU)
    assert after < before - SIZE / 2
    torch.ones(SIZE, dtype=torch.uint8)
    assert peak_memory(CPU) > after + SIZE / 2


def test_a_system_that_does_not_forget_keeps_the_peak_of_the_lifetime(tmp_path, monkeypatch):
    monkeypatch.setattr(peak_memory_module, "_CLEAR", tmp_path / "none" / "clear_refs")
    before = peak_memory(CPU)
    reset_peak_memory(CPU)
    assert peak_memory(CPU) >= before > 0
