"""A pretended accelerator: tensors that claim another device, and a count of the host's waits."""

from collections import Counter
from contextlib import contextmanager, nullcontext

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
"""The only device besides the CPU on which torch differentiates without hardware."""
_WAITING = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "repeat_interleave",
}
"""Operators whose result, or its size, the host must know."""


class OnDevice(torch.Tensor):
    """A tensor that is on the CPU and says that it is on ``DEVICE``."""

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, None)


class Waits(TorchDispatchMode):
    """Runs what is asked of ``DEVICE`` on the CPU, and counts where the host waits for it."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, self.counts)

    @property
    def total(self):
        return self.counts.total()


class _FromHost(TorchFunctionMode):
    """``torch.tensor(numbers, device=DEVICE)``, which never reaches the dispatcher."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == DEVICE:
            kwargs.pop("device")
            self.counts["from the host"] += 1
            return OnDevice(func(*args, **kwargs))
        if func is torch.Tensor.tolist and isinstance(args[0], OnDevice):
            self.counts["tolist"] += 1
            return args[0].held.tolist()
        return func(*args, **kwargs)


def _run(func, args, kwargs, counts):
    values = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    here = [value for value in values if isinstance(value, OnDevice)]
    target = kwargs.get("device")
    on_device = bool(here) if target is None else torch.device(target) == DEVICE
    name = func.overloadpacket.__name__
    if counts is not None and here:
        masked = name.startswith("index") and any(
            value.dtype == torch.bool
            for value in tree_flatten(args[1])[0]
            if hasattr(value, "dtype")
        )
        if name in _WAITING or masked:
            counts[name] += 1
    if name in ("_to_copy", "copy_") and counts is not None:
        there = [isinstance(value, OnDevice) for value in values]
        if there[-1] != (on_device if name == "_to_copy" else there[0]):
            counts["a copy between devices"] += 1
    elif here and any(value.ndim and not isinstance(value, OnDevice) for value in values):
        raise RuntimeError(f"{func} mixes devices")

    def held(value):
        if isinstance(value, OnDevice):
            return value.held
        return torch.device("cpu") if value == DEVICE else value

    with torch.utils._python_dispatch._disable_current_modes():
        result = func(*tree_map(held, args), **tree_map(held, kwargs))
    if name.endswith("_") and here and not name.startswith("_"):
        return args[0]
    if not on_device:
        return result
    return tree_map(lambda x: OnDevice(x) if isinstance(x, torch.Tensor) else x, result)


def moved(value):
    """A tensor on the pretended device."""
    return value if isinstance(value, OnDevice) else OnDevice(value)


@contextmanager
def counted_waits(monkeypatch):
    """Count the host's waits for the pretended device inside this context."""
    # torch knows no autocast of this device.
    for name, there in (
        ("autocast", nullcontext()),
        ("is_autocast_enabled", False),
        ("get_autocast_dtype", torch.bfloat16),
    ):
        monkeypatch.setattr(torch, name, _except_there(getattr(torch, name), there))
    waits = Waits()
    with _FromHost(waits.counts), waits:
        yield waits


def _except_there(function, there):
    def called(kind, *args, **kwargs):
        return there if kind == DEVICE.type else function(kind, *args, **kwargs)

    return called
