"""Random numbers of samples: one generator per (seed, index), and separate streams."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from memfree.data.random_streams import torch_generator


def generators(seed: int, indices: Sequence[int], attempt: int = 0) -> list[torch.Generator]:
    """One CPU generator per (seed, index), so independent of batches and ranks.

    torch keeps 32 bits of a seed: among n samples, expect n²/2³³ pairs with the same noise.
    """
    further = [attempt] if attempt else []
    return [torch_generator(seed, index, *further) for index in indices]


def draw(shape: Sequence[int], sources: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise (len(sources), *shape) float32, each row from its own generator."""
    return torch.stack(
        [torch.randn(tuple(shape), generator=source, dtype=torch.float32) for source in sources]
    )


def initial_noise(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The samples' initial noise: the first draw of each sample's generator."""
    return draw(shape, generators(seed, indices))


class _Borrowed:
    """Shared by threads: the first in keeps torch's state, the last out restores it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = 0
        self._states: RandomState = {}
        self._inside = threading.local()

    @contextmanager
    def __call__(self, device: torch.device) -> Iterator[None]:
        if getattr(self._inside, "yes", False):
            before = random_state(device)
            try:
                yield
            finally:
                set_random_state(before)
            return
        with self._lock:  # read inside, or another thread's state could be kept
            self._states = {**random_state(device), **self._states}
            self._threads += 1
        self._inside.yes = True
        try:
            yield
        finally:
            self._inside.yes = False
            with self._lock:
                self._threads -= 1
                if not self._threads:
                    for place, state in self._states.items():
                        if not torch.equal(random_state(place)[place], state):
                            set_random_state({place: state})
                    self._states = {}


RandomState = dict[torch.device, Tensor]  # of torch's own generators


def random_state(device: torch.device) -> RandomState:
    """States of torch's own generators for the CPU and a device."""
    state: RandomState = {torch.device("cpu"): torch.get_rng_state()}
    if device.type != "cpu":
        state[device] = torch.get_device_module(device).get_rng_state(*_index(device))
    return state


def set_random_state(states: RandomState) -> None:
    """Set torch's own generators."""
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, *_index(device))


def _index(device: torch.device) -> tuple[torch.device, ...]:
    """Apple's module takes no device index."""
    return () if device.type == "mps" else (device,)


kept_random_state = _Borrowed()
"""``with kept_random_state(device)``: restores torch's own generators afterwards."""


class OwnRandomness:
    """A separate random stream for code that draws without a generator.

    Torch's global generators are restored, so other samples stay the same; meanwhile other threads
    draw from this stream. So code that rarely draws is watched at its first use (``if_drawn``).
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._state: RandomState = {}

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Draw from the stream on the CPU and on a device."""
        with kept_random_state(device):
            if not self._state:
                self._state = {
                    place: torch.Generator(place).manual_seed(self.seed).get_state()
                    for place in random_state(device)
                }
            set_random_state(self._state)
            try:
                yield
            finally:
                self._state = random_state(device)

    @contextmanager
    def if_drawn(self, device: torch.device, draws: dict[str, bool], part: str) -> Iterator[None]:
        """``on`` if this part draws, else nothing; ``draws`` notes what its first use did."""
        if part in draws:
            with self.on(device) if draws[part] else nullcontext():
                yield
            return
        with kept_random_state(device):
            before = random_state(device)
            yield
            after = random_state(device)
            draws[part] = any(not torch.equal(state, after[at]) for at, state in before.items())
