"""Hooks on a pipeline's denoiser for one call alone; arguments, wrappers, caches."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor, nn

Before = Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[Any, Any] | None]
"""A forward pre-hook with keyword arguments."""
After = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], Any]
"""A forward hook with keyword arguments."""

_CALL: ContextVar[object | None] = ContextVar("memfree_guarded_call", default=None)
"""The guarded pipeline call that this thread or task is in; None outside of all, and aside."""
_LOCK = threading.Lock()


def in_guarded_call() -> bool:
    """Whether what runs now is the loop of a guarded pipeline call, in this thread or task."""
    return _CALL.get() is not None


@contextmanager
def aside() -> Iterator[None]:
    """Run what is not the guarded call's own: there, hooks do not fire."""
    token = _CALL.set(None)
    try:
        yield
    finally:
        _CALL.reset(token)


@contextmanager
def hooked(denoiser: Any, after: After, before: Before | None = None) -> Iterator[None]:
    """Hooks on a denoiser that fire only for calls made in this block, by this thread or task.

    Other pipelines that share the denoiser, in other threads or in callbacks (``aside``), see
    nothing of them. What the hooks run is not traced by ``torch.compile``, and calls no hook again.

    Args:
        denoiser: the module that the pipeline calls.
        after: the forward hook.
        before: the forward pre-hook.
    """
    call = object()

    def only_here(hook: Callable[..., Any]) -> Callable[..., Any]:
        # Not (module, args, kwargs): torch may hand over less where another thread removes its
        # hook in the middle of a call of ours.
        def run(*given: Any) -> Any:
            if _CALL.get() is not call:
                return None
            with aside():
                return hook(*given)

        # Nothing is compiled where this is not imported, and importing it takes seconds.
        return torch.compiler.disable(run) if "torch._dynamo" in sys.modules else run

    hooks = (None if before is None else only_here(before), only_here(after))
    token = _CALL.set(call)
    try:
        with _compiled(denoiser, hooks) if _is_compiled(denoiser) else _plain(denoiser, hooks):
            yield
    finally:
        _CALL.reset(token)


class Watch:
    """A pre-hook of a denoiser that tells of calls by others than guarded pipeline calls.

    Copies and pickles of the denoiser hold one that tells nobody.

    Args:
        called: what such a call is told to.
    """

    def __init__(self, called: Callable[[], None] | None = None) -> None:
        self._called = called

    def __call__(self, module: Any, args: Any, kwargs: Any) -> None:
        """Tell, unless this is a guarded call's own."""
        if self._called is not None and not in_guarded_call():
            self._called()

    def __reduce__(self) -> tuple[Any, ...]:
        return Watch, ()


@contextmanager
def watched(denoiser: Any, called: Callable[[], None]) -> Iterator[None]:
    """``called`` is called, in this block, whenever no guarded pipeline call calls the denoiser.

    Args:
        denoiser: the module that several pipelines may share.
        called: takes no arguments.
    """
    hooks: Hooks = (Watch(called), None)
    with _compiled(denoiser, hooks) if _is_compiled(denoiser) else _plain(denoiser, hooks):
        yield


Hooks = tuple[Callable[..., Any] | None, Callable[..., Any] | None]


@contextmanager
def _plain(denoiser: Any, hooks: Hooks) -> Iterator[None]:
    before, after = hooks
    handles = []
    if after is not None:
        handles.append(denoiser.register_forward_hook(after, with_kwargs=True))
    if before is not None:
        handles.append(denoiser.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_compiled(denoiser: Any) -> bool:
    """Whether ``denoiser.compile()`` was called, which compiles the module's hooks as well."""
    return getattr(denoiser, "_compiled_call_impl", None) is not None


@contextmanager
def _compiled(denoiser: Any, hooks: Hooks) -> Iterator[None]:
    """Hooks around a compiled module, outside of its graph.

    Torch ignores hooks that are registered after the graph was made, and traces those before. There
    is no public place for the compiled call; torch 2.x keeps it in ``_compiled_call_impl``.
    """
    with _LOCK:
        around = denoiser._compiled_call_impl
        if not isinstance(around, _AroundCompiled):
            around = denoiser._compiled_call_impl = _AroundCompiled(denoiser, around)
        around.hooks = [*around.hooks, hooks]
    try:
        yield
    finally:
        with _LOCK:
            around.hooks = [one for one in around.hooks if one is not hooks]
            if not around.hooks and denoiser._compiled_call_impl is around:
                denoiser._compiled_call_impl = around.compiled


class _AroundCompiled:
    """A module's compiled call with hooks around it."""

    def __init__(self, module: Any, compiled: Callable[..., Any]) -> None:
        self.module = module
        self.compiled = compiled
        self.hooks: list[Hooks] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hooks = self.hooks
        for before, _ in hooks:
            changed = None if before is None else before(self.module, args, kwargs)
            if changed is not None:
                args, kwargs = changed
        output = self.compiled(*args, **kwargs)
        for _, after in hooks:
            if after is None:
                continue
            changed = after(self.module, args, kwargs, output)
            output = output if changed is None else changed
        return output


class _Aside(MultiPipelineCallbacks):
    """An official callback of diffusers that runs ``aside``."""

    def __init__(self, callback: Any, run: Callable[..., Any]) -> None:
        super().__init__([callback])
        self._run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the callback."""
        return self._run(*args, **kwargs)


def callback_aside(callback: Any, check: Callable[[], None]) -> Any:
    """A pipeline's callback that runs ``aside``, and is what the pipeline takes for one.

    Args:
        callback: a function, or an official callback of diffusers.
        check: called after it.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        with aside():
            result = callback(*args, **kwargs)
        check()
        return result

    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        return _Aside(callback, run)
    return run


@dataclass(frozen=True)
class Signature:
    """What a denoiser takes, by name, however the pipeline's object is wrapped.

    Args:
        denoiser: the pipeline's.
        known: the class of diffusers that the family's pipelines are written for.
        needed: names of arguments that guidance cannot do without.
    """

    denoiser: Any
    known: type
    needed: tuple[str, ...]

    @property
    def own(self) -> inspect.Signature:
        """Of the class: an instance's ``forward`` may have been replaced (DeepCache, accelerate).

        A wrapper that takes ``*args, **kwargs`` has no names; then it is called as what it wraps.
        """
        module = getattr(self.denoiser, "_orig_mod", self.denoiser)  # under torch.compile
        signature = inspect.signature(type(module).forward)
        if set(self.needed) <= signature.parameters.keys():
            return signature
        return inspect.signature(self.known.forward)  # type: ignore[attr-defined]

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of a call by name.

        Raises:
            ValueError: they are not the denoiser's.
        """
        signature = self.own
        try:
            bound = signature.bind(self.denoiser, *args, **kwargs)
        except TypeError as error:
            raise ValueError(
                f"memfree.guard: {type(self.denoiser).__name__} is not called as a "
                f"{self.known.__name__}: {error}"
            ) from error
        arguments = dict(list(bound.arguments.items())[1:])
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(name, {}))
        if missing := [name for name in self.needed if name not in arguments]:
            raise ValueError(
                f"memfree.guard: {type(self.denoiser).__name__} was called without {missing[0]}"
            )
        return arguments

    def unbind(
        self, arguments: Mapping[str, Any], positional: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as a call that has ``positional`` of them without a name."""
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
    """Refuses a denoiser that keeps something of one call for the next.

    A call for another caption would be answered from the cache, and its own outputs would be kept
    for the pipeline's next step: DeepCache, TeaCache, T-GATE, and diffusers' own caches. Those of
    third parties are known by the tensors that a call leaves behind, beside weights and buffers.

    Args:
        denoiser: before the first call.
    """

    def __init__(self, denoiser: Any) -> None:
        self._denoiser = denoiser
        self._before = {id(tensor): tensor for _, tensor in _kept_tensors(denoiser)}

    def __call__(self) -> None:
        """After the first call.

        Raises:
            ValueError: a cache is enabled.
        """
        if getattr(self._denoiser, "is_cache_enabled", False):
            raise ValueError(_cached("enable_cache", "call disable_cache() on it"))
        for module in self._denoiser.modules():
            # diffusers has no public list of a module's hooks.
            hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
            stateful = [hook for hook in hooks.values() if getattr(hook, "_is_stateful", False)]
            if stateful:
                raise ValueError(_cached(type(stateful[0]).__name__, "remove the hook"))
        for where, tensor in _kept_tensors(self._denoiser):
            if id(tensor) not in self._before:
                raise ValueError(_cached(where, "disable the cache"))


def _cached(what: str, instead: str) -> str:
    return (
        f"memfree.guard: the denoiser caches what it computes ({what}), which further calls for "
        f"captions would spoil: {instead}, or guide without captions (c2=0)"
    )


_OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes that every module has: parameters, buffers, submodules and hooks."""
_HARMLESS = ("accelerate.", "diffusers.hooks.", "memfree.")
"""Where offloading and casting move weights about, and what the guard itself puts there."""
_DEPTH = 5
"""How far below a module's attribute tensors are looked for."""


def _kept_tensors(denoiser: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors that modules keep beside their weights and buffers, each with its attribute."""
    kinds: set[type] = {nn.Module}
    for module in denoiser.modules():
        attributes: dict[str, Any] = {}
        for kind in type(module).__mro__:  # TeaCache's program writes to the class
            if kind not in kinds:
                kinds.add(kind)
                attributes |= vars(kind)
        attributes |= vars(module)
        for name, value in attributes.items():
            if name not in _OF_TORCH and not name.startswith("_hf_"):  # accelerate's weights
                for tensor in _tensors(value, _DEPTH):
                    yield f"{type(module).__name__}.{name}", tensor


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    """Tensors within reach: in containers, closures, bound objects, attention processors."""
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
        parts = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    elif hasattr(value, "config"):
        return  # a pipeline or a scheduler
    else:
        own = vars(type(value)).values()
        parts = [one for one in own if isinstance(one, (Tensor, Mapping, list))]
        parts += getattr(value, "__dict__", {}).values()
    for part in parts:
        yield from _tensors(part, depth - 1)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - raises where the variable has no value yet
    except ValueError:
        return False
    return True
