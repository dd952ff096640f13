"""Hooks on a pipeline's denoiser that last one call; its arguments, wrappers and caches."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor, nn

Before = Callable[..., tuple[Any, Any] | None]  # a forward pre-hook with keyword arguments
After = Callable[..., Any]  # a forward hook with keyword arguments

# The guarded pipeline call that this thread or task is in; outside (None), hooks do nothing.
_CALL: ContextVar[object | None] = ContextVar("memfree_guarded_call", default=None)
_LOCK = threading.Lock()


@contextmanager
def _inside(call: object | None) -> Iterator[None]:
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)


@contextmanager
def hooked(denoiser: Any, after: After, before: Before | None = None) -> Iterator[None]:
    """Hook a denoiser for calls made in this block by this thread or task only.

    ``torch.compile`` does not trace what the hooks run, and no hook fires inside a hook.
    """
    call = object()

    def only_here(hook: Callable[..., Any]) -> Callable[..., Any]:
        # Not (module, args, kwargs): torch may pass fewer if another thread removes its hook
        # during our call.
        def run(*given: Any) -> Any:
            if _CALL.get() is not call:
                return None
            with _inside(None):
                return hook(*given)

        # Nothing is compiled unless this is imported, and the import takes seconds.
        return torch.compiler.disable(run) if "torch._dynamo" in sys.modules else run

    with _inside(call), _hooks(denoiser, before and only_here(before), only_here(after)):
        yield


class Watch:
    """A pre-hook that reports unguarded calls; copies and pickles of it do nothing."""

    def __init__(self, called: Callable[[], None] | None = None) -> None:
        self._called = called

    def __call__(self, module: Any, args: Any, kwargs: Any) -> None:
        """Forward pre-hook."""
        if self._called is not None and _CALL.get() is None:
            self._called()

    def __reduce__(self) -> tuple[Any, ...]:
        return Watch, ()


@contextmanager
def watched(denoiser: Any, called: Callable[[], None]) -> Iterator[None]:
    """Call ``called`` in this block whenever an unguarded call runs the denoiser."""
    with _hooks(denoiser, Watch(called), None):
        yield


@contextmanager
def _hooks(denoiser: Any, before: Before | None, after: After | None) -> Iterator[None]:
    """After ``compile()`` torch ignores new hooks; 2.x calls ``_compiled_call_impl`` instead."""
    if getattr(denoiser, "_compiled_call_impl", None) is None:
        with ExitStack() as stack:
            if after is not None:
                stack.enter_context(denoiser.register_forward_hook(after, with_kwargs=True))
            if before is not None:
                stack.enter_context(denoiser.register_forward_pre_hook(before, with_kwargs=True))
            yield
        return
    hooks = before, after
    with _LOCK:
        around = denoiser._compiled_call_impl
        if not isinstance(around, _AroundCompiled):
            around = denoiser._compiled_call_impl = _AroundCompiled(denoiser, around)
        around.hooks = [*around.hooks, hooks]
    try:
        yield
    finally:
        with _LOCK:
            around.hooks = [pair for pair in around.hooks if pair is not hooks]
            if not around.hooks and denoiser._compiled_call_impl is around:
                denoiser._compiled_call_impl = around.compiled


class _AroundCompiled:
    def __init__(self, module: Any, compiled: Callable[..., Any]) -> None:
        self.module = module
        self.compiled = compiled
        self.hooks: list[tuple[Before | None, After | None]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hooks = self.hooks
        for before, _ in hooks:
            changed = None if before is None else before(self.module, args, kwargs)
            if changed is not None:
                args, kwargs = changed
        output = self.compiled(*args, **kwargs)
        for _, after in hooks:
            changed = None if after is None else after(self.module, args, kwargs, output)
            output = output if changed is None else changed
        return output


def callback_aside(callback: Any, check: Callable[[], None]) -> Any:
    """Run a pipeline's callback outside the guarded call, then ``check``."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _inside(None):
            result = callback(*args, **kwargs)
        check()
        return result

    if not isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        return run
    official: Any = run
    official.tensor_inputs = callback.tensor_inputs
    return MultiPipelineCallbacks([official])


@dataclass(frozen=True)
class Signature:
    """The arguments of a denoiser by name, however it is wrapped."""

    denoiser: Any
    known: type  # the class of diffusers that the family's pipelines are written for
    needed: tuple[str, ...]  # arguments that guidance needs

    @property
    def own(self) -> inspect.Signature:
        """The class's signature; for a wrapper with ``*args, **kwargs``, that of what it wraps."""
        module = getattr(self.denoiser, "_orig_mod", self.denoiser)  # under torch.compile
        signature = inspect.signature(type(module).forward)
        if set(self.needed) <= signature.parameters.keys():
            return signature
        return inspect.signature(self.known.forward)  # type: ignore[attr-defined]

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of a call by name; ValueError if they are not the denoiser's."""
        signature, name = self.own, type(self.denoiser).__name__
        try:
            bound = signature.bind(self.denoiser, *args, **kwargs)
        except TypeError as error:
            raise ValueError(
                f"memfree.guard: {name} is not called as a {self.known.__name__}: {error}"
            ) from error
        _, *arguments = bound.arguments.items()
        by_name = dict(arguments)
        for parameter in signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                by_name.update(by_name.pop(parameter.name, {}))
        if missing := [needed for needed in self.needed if needed not in by_name]:
            raise ValueError(f"memfree.guard: {name} was called without {missing[0]}")
        return by_name

    def unbind(
        self, arguments: Mapping[str, Any], positional: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as a call that passes the first ``positional`` without a name."""
        args: list[Any] = []
        rest = dict(arguments)
        for name, parameter in list(self.own.parameters.items())[1:]:
            if name not in rest or len(args) >= positional:
                break
            value = rest.pop(name)
            several = parameter.kind is inspect.Parameter.VAR_POSITIONAL
            args += list(value) if several else [value]
        return tuple(args), rest


class CacheCheck:
    """Refuses a denoiser that caches results between calls; create it before the first call.

    Calls for other captions would spoil a cache (DeepCache, TeaCache, T-GATE, diffusers'). Those of
    third parties are recognised by tensors that a call leaves besides weights and buffers.
    """

    def __init__(self, denoiser: Any) -> None:
        self._denoiser = denoiser
        self._before = {id(tensor): tensor for _, tensor in _kept_tensors(denoiser)}

    def __call__(self) -> None:
        """Raise ValueError if a cache is on; to be called after the first call."""
        if (cache := next(self._caches(), None)) is not None:
            raise ValueError(
                f"memfree.guard: the denoiser caches what it computes ({cache[0]}), which further "
                f"calls for captions would spoil: {cache[1]}, or guide without captions (c2=0)"
            )

    def _caches(self) -> Iterator[tuple[str, str]]:
        if getattr(self._denoiser, "is_cache_enabled", False):
            yield "enable_cache", "call disable_cache() on it"
        for module in self._denoiser.modules():
            # diffusers has no public list of a module's hooks.
            for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
                if getattr(hook, "_is_stateful", False):
                    yield type(hook).__name__, "remove the hook"
        for where, tensor in _kept_tensors(self._denoiser):
            if id(tensor) not in self._before:
                yield where, "disable the cache"


_OF_TORCH = frozenset(vars(nn.Module()))  # parameters, buffers, submodules and hooks
_HARMLESS = ("accelerate.", "diffusers.hooks.", "memfree.")  # these move weights or are our hooks
_DEPTH = 5  # how deep to search a module's attribute for tensors


def _kept_tensors(denoiser: Any) -> Iterator[tuple[str, Tensor]]:
    kinds: set[type] = {nn.Module}
    for module in denoiser.modules():
        attributes: dict[str, Any] = {}
        for kind in type(module).__mro__:  # TeaCache writes to the class
            if kind not in kinds:
                kinds.add(kind)
                attributes |= vars(kind)
        attributes |= vars(module)
        for name, value in attributes.items():
            if name not in _OF_TORCH and not name.startswith("_hf_"):  # accelerate's weights
                for tensor in _tensors(value, _DEPTH):
                    yield f"{type(module).__name__}.{name}", tensor


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if depth == 0 or isinstance(value, (nn.Module, type, str, bytes, int, float)):
        return
    if inspect.isfunction(value) or not isinstance(value, (Mapping, list, tuple, set)):
        place = value if inspect.isfunction(value) else type(value)
        if str(place.__module__).startswith(_HARMLESS):
            return
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        parts = list(value)
    elif isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif inspect.ismethod(value):
        parts = [value.__func__, value.__self__]
    elif inspect.isfunction(value):
        parts = []
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # the variable has no value yet
                parts.append(cell.cell_contents)
    elif hasattr(value, "config"):
        return  # a pipeline or a scheduler
    else:
        own = vars(type(value)).values()
        parts = [part for part in own if isinstance(part, (Tensor, Mapping, list))]
        parts += getattr(value, "__dict__", {}).values()
    for part in parts:
        yield from _tensors(part, depth - 1)
