import sys

import pytest
import torch

from memfree.sampling.peak_memory import peak_memory, reset_peak_memory

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can forget a process's peak")
def test_the_peak_is_of_what_came_after_the_reset():
    size = 200_000_000
    held = torch.ones(size, dtype=torch.uint8)
    before = peak_memory(CPU)
    del held
    reset_peak_memory(CPU)
    after = peak_memory(CPU)
    assert after < before - size / 2
    torch.ones(size, dtype=torch.uint8)
    assert peak_memory(CPU) > after + size / 2
