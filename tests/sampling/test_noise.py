"""Streams beside torch's own random numbers, with other threads about."""

import sys
import threading

import pytest
import torch

from memfree.sampling.noise import OwnRandomness

CPU = torch.device("cpu")


@pytest.fixture
def hasty():
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def always(own, draws):
    return own.on(CPU)


def watched(own, draws):
    draws.clear()
    return own.if_drawn(CPU, draws, "part")


@pytest.mark.parametrize("enter", [(always, always), (watched, always)], ids=["on", "watched"])
def test_torchs_generator_stays_where_it_was_whichever_thread_leaves_last(hasty, enter):
    own = [OwnRandomness(seed) for seed in range(4)]
    failed = []

    def draw(which):
        try:
            for _ in range(1000):
                with enter[which % 2](own[which], {}):
                    torch.rand(3)
        except BaseException as error:
            failed.append(error)
            raise

    before = torch.get_rng_state()
    threads = [threading.Thread(target=draw, args=(which,)) for which in range(len(own))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert torch.equal(torch.get_rng_state(), before)


def test_a_part_is_watched_once(hasty):
    own, draws = OwnRandomness(1), {}
    before = torch.get_rng_state()
    for part, numbers in (("draws", 3), ("does not", 0)):
        with own.if_drawn(CPU, draws, part):
            torch.rand(numbers)
        assert torch.equal(torch.get_rng_state(), before)
    assert draws == {"draws": True, "does not": False}
    drawn = []
    for _ in range(2):
        with own.if_drawn(CPU, draws, "draws"):
            drawn.append(torch.rand(3))
        assert torch.equal(torch.get_rng_state(), before)
    expected = torch.Generator().manual_seed(1)
    assert all(torch.equal(one, torch.rand(3, generator=expected)) for one in drawn)
