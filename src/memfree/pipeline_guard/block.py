"""``memfree.guard``: guidance and verdicts for every call of a diffusers pipeline in a block."""

from __future__ import annotations

import copy
import functools
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, ParamSpec

from memfree.data.split import DEFAULT_RATE
from memfree.guidance import (
    MITIGATIONS,
    Guidance,
    GuidanceSettings,
    calibration_of,
    default_similarity,
)
from memfree.guidance.baselines import TextTools
from memfree.guidance.mitigation import Mitigation, mitigation_at
from memfree.guidance.options import is_import_path
from memfree.pipeline_guard.call import Watched
from memfree.pipeline_guard.decode import Decoder
from memfree.pipeline_guard.families import family_of
from memfree.pipeline_guard.noise_level import check_scheduler
from memfree.pipeline_guard.report import GuardReport
from memfree.pipeline_guard.session import Judge, OnCopy, Session
from memfree.retrieval import ReferenceIndex


def loading_adapters(kind: Any) -> Callable[..., None]:
    """``load_lora_weights`` of a pipeline's class, with a message that says what is wrong.

    Where the weights are of other shapes than the pipeline's, diffusers lists every layer, and
    leaves behind what it loaded into other parts of the pipeline; here that goes as well.

    Raises:
        ValueError: by the returned method: the LoRA was trained for another model.
    """

    @functools.wraps(kind.load_lora_weights)
    def load_lora_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        before = _names(self)
        try:
            kind.load_lora_weights(self, *args, **kwargs)
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            if new := sorted(_names(self) - before):
                self.delete_adapters(new)
            raise ValueError(
                f"memfree.guard: the LoRA does not fit this {kind.__name__}: it was trained for a "
                "model of other shapes"
            ) from error

    return load_lora_weights


def _names(pipe: Any) -> set[str]:
    """Adapters in any part of the pipeline."""
    return {name for names in pipe.get_list_adapters().values() for name in names}


def check_index(name: str, value: Any) -> None:
    """Refuse what is no index in memory.

    Raises:
        ValueError: it is a path, or something else.
    """
    if not isinstance(value, ReferenceIndex):
        raise ValueError(
            f"memfree.guard: {name} must be a ReferenceIndex, not {value!r}: give "
            "ReferenceIndex.load(folder)"
        )


def check_numbers(budget: Any, chunk_size: Any, seed: Any, false_positive_rate: Any) -> None:
    """Refuse numbers that are none, or too small.

    Raises:
        ValueError: names the argument.
    """
    whole = {"budget": (budget, 1), "seed": (seed, 0)}
    if chunk_size is not None:
        whole["chunk_size"] = (chunk_size, 1)
    for name, (value, least) in whole.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(
                f"memfree.guard: {name} must be a whole number of at least {least}, not {value!r}"
            )
    if not isinstance(false_positive_rate, Real) or not 0 < float(false_positive_rate) < 1:
        raise ValueError(
            "memfree.guard: false_positive_rate must be a number between 0 and 1, not "
            f"{false_positive_rate!r}"
        )


def check_guidance(guidance: Any, mitigation: Any) -> Mitigation | None:
    """The mitigation, also by import path; refuse what cannot guide, or has the other's name.

    Raises:
        ValueError: names the argument, and what to give instead.
    """
    if isinstance(mitigation, str) and is_import_path(mitigation):
        mitigation = mitigation_at(mitigation)
    if mitigation is not None and not isinstance(mitigation, Mitigation):
        raise ValueError(
            f"memfree.guard: mitigation must be a Mitigation, not {mitigation!r}"
            f"{_instead(mitigation)}"
        )
    if isinstance(guidance, GuidanceSettings):
        if mitigation is not None:
            raise ValueError("memfree.guard: give guidance settings or a mitigation, not both")
        return None
    listed = isinstance(guidance, Sequence) and not isinstance(guidance, str)
    for one in guidance if listed else [guidance]:
        if one is not None and (not callable(one) or isinstance(one, (type, Mitigation))):
            raise ValueError(
                "memfree.guard: guidance must be a guidance, a list of them, or GuidanceSettings, "
                f"not {one!r}{_instead(one)}"
            )
    return mitigation


def _instead(value: Any) -> str:
    if isinstance(value, Mitigation):
        return ": give it as mitigation="
    if isinstance(value, type):
        return ": give an instance of it"
    if isinstance(value, str) and value in MITIGATIONS:
        return f": give guidance=GuidanceSettings({value!r})"
    return ""


_MARK = "_memfree_guarded"
_P = ParamSpec("_P")


class Guarding(ContextDecorator, AbstractContextManager[GuardReport]):
    """What ``guard`` returns: a block for each ``with``, one after the other, or a decorator.

    Every block has a report of its own and, where none was given, a seed of its own.

    Args:
        begin: makes the context manager of one block.
    """

    def __init__(self, begin: Callable[[], AbstractContextManager[GuardReport]]) -> None:
        self._begin = begin
        self._block: AbstractContextManager[GuardReport] | None = None

    def __enter__(self) -> GuardReport:
        block = self._begin()
        report = block.__enter__()  # refuses a second block in the first
        self._block = block
        return report

    def __exit__(self, *raised: Any) -> bool | None:
        assert self._block is not None
        return self._block.__exit__(*raised)


def _for_every_block(
    block: Callable[_P, AbstractContextManager[GuardReport]],
) -> Callable[_P, Guarding]:
    @functools.wraps(block)
    def guard(*args: _P.args, **kwargs: _P.kwargs) -> Guarding:
        return Guarding(lambda: block(*args, **kwargs))

    return guard


@_for_every_block
@contextmanager
def guard(
    pipe: Any,
    index: ReferenceIndex,
    guidance: Guidance | Sequence[Guidance] | GuidanceSettings | None = None,
    mitigation: Mitigation | str | None = None,
    on_copy: OnCopy = "keep",
    budget: int = 4,
    false_positive_rate: float = DEFAULT_RATE,
    decoder: Any = None,
    chunk_size: int | None = None,
    seed: int | None = None,
    latents: ReferenceIndex | None = None,
) -> Iterator[GuardReport]:
    """Guide and judge every call of a diffusers pipeline inside a ``with`` block.

    The pipeline keeps its own call: prompts, negative prompts, schedulers, LoRAs, batch sizes,
    generators. A forward hook on its denoiser passes every prediction through the guidance (Chen,
    Liu, Xu, 2024, eq. 10), and finished images are compared with the index. Where no guidance is
    active, images have the bits of the unguarded pipeline. Supported: Stable Diffusion 1, 2 and XL
    with their img2img, inpainting and ControlNet pipelines, latent consistency models, PixArt,
    Stable Diffusion 3 with its img2img pipeline.

    Inside the block the pipeline's class is a subclass of its own, which sees ``__call__`` and what
    it prepares; a hook on the denoiser guides. Copies of the pipeline (``copy.copy``,
    ``copy.deepcopy``) are guarded to the end of the block as well. A pipeline that shares the
    denoiser in another way, such as one that ``from_pipe`` makes, is not: the first time it is
    called a warning says so, and so does the report. Afterwards, also after an exception, the
    pipeline is as it was.

    Args:
        pipe: the pipeline.
        index: calibrated references; with ``latents`` it is moved to the pipeline's device for the
            block.
        guidance: one guidance, several in order, or settings; None:
            ``AntiMemorizationGuidance.recommended(index)`` (without its caption term where the
            index has no captions or the pipeline no text encoder), or with a ``mitigation`` its
            own guidances alone. An empty list guides nothing and judges all the same. Settings run
            all stages of what they name, the field's baselines included, and their budget is that
            of ``reject``.
        mitigation: all stages of a mitigation, or of that at an import path; its guidances come
            before ``guidance``.
        on_copy: what happens to a finished image that is a copy: ``keep`` returns it with its
            verdict; ``refuse`` puts None in its place; ``resample`` draws it again with other seeds
            and refuses what is still a copy when the budget is spent. With None among them,
            images are a list whatever the ``output_type``.
        budget: draws of an image at most, the first included, for ``resample`` and for what the
            mitigation does not accept.
        false_positive_rate: of the verdict, and of the guidance where its settings have the
            default; within what the index's calibration allows.
        decoder: a cheaper autoencoder of the same latents for the clean estimates, such as
            ``AutoencoderTiny``, moved to the pipeline's device for the block; None: the pipeline's
            own. What it blurs is noticed later or not, so that guidance may begin at another step;
            the last step with its final correction, and the verdicts, are of the pipeline's own.
        chunk_size: latents decoded and finished images judged at a time; None: the whole batch.
            On the way, the images of a step are embedded together.
        seed: of further draws and of what a mitigation draws; the pipeline's first draw has the
            generators of its own call. None: another one for every guard, from the operating
            system; ``report.seed`` says which.
        latents: references of multiplicity guidance in the denoiser's own space, for settings that
            name it.

    Yields:
        The report: trace and verdicts, filled by every pipeline call in the block.

    Raises:
        ValueError: the pipeline, its scheduler or its arguments are not supported, or the index is
            not calibrated.
        torch.OutOfMemoryError: with a line that says which option lowers the memory.
    """
    if on_copy not in ("keep", "resample", "refuse"):
        raise ValueError(
            f"memfree.guard: on_copy must be keep, resample or refuse, not {on_copy!r}"
        )
    if seed is None:
        seed = secrets.randbits(63)  # not from torch's generator, which is the caller's
    check_numbers(budget, chunk_size, seed, false_positive_rate)
    check_index("index", index)
    if latents is not None:
        check_index("latents", latents)
    mitigation = check_guidance(guidance, mitigation)
    kind = type(pipe)
    if getattr(kind, _MARK, False):
        raise ValueError("memfree.guard: this pipeline is guarded already; guards do not nest")
    family = family_of(pipe)
    check_scheduler(pipe.scheduler, family.flow)
    similarity = default_similarity(index)
    calibration = calibration_of(index, similarity)
    calibration.threshold(false_positive_rate)  # refuses a rate that it does not allow
    if isinstance(guidance, GuidanceSettings):
        if guidance.false_positive_rate == DEFAULT_RATE:
            guidance = replace(guidance, false_positive_rate=false_positive_rate)
        _check_settings(guidance, index, latents)
    decode = Decoder(pipe.vae, index, chunk_size, decoder, latents)
    home = None if decoder is None else decoder.device
    moved = [(one, one.device, one.features.device) for one in (index, latents) if one is not None]
    try:
        if decoder is not None:
            decoder.to(pipe._execution_device)
        for one, _, _ in moved:
            one.to(pipe._execution_device)
        if isinstance(guidance, GuidanceSettings):
            budget = guidance.budget if guidance.mitigation == "reject" else budget
            tokenizer = getattr(pipe, "tokenizer", None) or getattr(pipe, "tokenizer_2", None)
            tools = None if tokenizer is None else TextTools.of(tokenizer, index)
            mitigation = guidance.for_text(index, tools, latents)
            guidance = None
        judge = Judge(index, similarity, calibration, false_positive_rate, chunk_size)
        session = Session(
            kind,
            family,
            _guidances(guidance, mitigation, index, false_positive_rate),
            _without_captions(guidance, mitigation, index, false_positive_rate),
            mitigation,
            judge,
            decode,
            on_copy,
            budget,
            seed,
        )
        session.take(pipe, _guarded(kind, session))
        try:
            yield session.report
        finally:
            session.release()
    finally:
        if decoder is not None:
            decoder.to(home)
        for one, vectors, weights in moved:
            one.to(vectors)
            if weights is not None:  # they may be the pipeline's own autoencoder
                one.features.to(weights)


def _check_settings(
    settings: GuidanceSettings, index: ReferenceIndex, latents: ReferenceIndex | None
) -> None:
    """Refuse settings whose references or captions are missing."""
    if settings.needs_captions and index.captions is None:
        raise ValueError(
            "memfree.guard: the index has no captions, which c2 steers away from: build it on "
            "captioned images, or give c2=0"
        )
    if settings.mitigation not in ("multiplicity", "both"):
        return
    if latents is None:
        raise ValueError(
            f"memfree.guard: the mitigation {settings.mitigation} needs latents=, an index that "
            "`memfree index --features latents` wrote"
        )
    if latents.captions is None:
        raise ValueError(
            "memfree.guard: latents= has no captions, which tell the references of a prompt: build "
            "it on captioned images"
        )


def _guidances(
    guidance: Guidance | Sequence[Guidance] | None,
    mitigation: Mitigation | None,
    index: ReferenceIndex,
    false_positive_rate: float,
) -> list[Guidance]:
    if guidance is None:
        if mitigation is not None:
            return []
        settings = GuidanceSettings("amg", false_positive_rate)
        if index.captions is None:
            settings.c2 = 0.0  # there is no caption y_N to steer away from (eq. 15)
        return [settings.anti_memorization(index)]
    return list(guidance) if isinstance(guidance, Sequence) else [guidance]


def _without_captions(
    guidance: Guidance | Sequence[Guidance] | None,
    mitigation: Mitigation | None,
    index: ReferenceIndex,
    false_positive_rate: float,
) -> list[Guidance] | None:
    """The default guidance for calls without a text encoder; None: there is no other guidance."""
    if guidance is not None or mitigation is not None or index.captions is None:
        return None
    return [GuidanceSettings("amg", false_positive_rate, c2=0.0).anti_memorization(index)]


def _guarded(kind: Any, session: Session) -> type:
    """A subclass of the pipeline's class that goes through the session; it keeps the name."""

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if type(self) is not guarded:  # a method that was kept beyond the block
            return kind.__call__(self, *args, **kwargs)
        return session.call(self, args, kwargs)

    @functools.wraps(kind.prepare_latents)
    def prepare_latents(self: Any, *args: Any, **kwargs: Any) -> Any:
        return session.prepared(self, kind.prepare_latents(self, *args, **kwargs))

    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        """A pipeline that is made in the block, as by ``pipe.from_pipe``, is an ordinary one."""
        return kind(*args, **kwargs)

    def copied(self: Any) -> Any:
        made = object.__new__(kind)
        vars(made).update(vars(self))
        return session.take(made, guarded)

    def deeply_copied(self: Any, memo: dict[int, Any]) -> Any:
        made = object.__new__(kind)
        memo[id(self)] = made
        with session.unwatched(self):  # or the copy of the denoiser would keep our hook
            vars(made).update(copy.deepcopy(vars(self), memo))
        return session.take(made, guarded)

    def reduced(self: Any, protocol: Any) -> Any:
        """What is pickled is an ordinary pipeline."""
        return object.__new__, (kind,), vars(self)

    names = {
        "__call__": call,
        "__new__": new,
        "__copy__": copied,
        "__deepcopy__": deeply_copied,
        "__reduce_ex__": reduced,
        "prepare_latents": prepare_latents,
        "image_processor": _watched_processor(session),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        _MARK: True,
    }
    if hasattr(kind, "prepare_mask_latents"):

        @functools.wraps(kind.prepare_mask_latents)
        def prepare_mask_latents(self: Any, *args: Any, **kwargs: Any) -> Any:
            return session.masked(kind.prepare_mask_latents(self, *args, **kwargs))

        names["prepare_mask_latents"] = prepare_mask_latents
    if hasattr(kind, "load_lora_weights"):  # PixArt's pipelines have none
        names["load_lora_weights"] = loading_adapters(kind)
    guarded = type(kind.__name__, (kind,), names)
    return guarded


def _watched_processor(session: Session) -> property:
    """``pipe.image_processor``, which shows the session what becomes an output."""

    def read(self: Any) -> Watched:
        if "image_processor" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no image_processor")
        return Watched(vars(self)["image_processor"], session.postprocessed)

    def write(self: Any, value: Any) -> None:
        vars(self)["image_processor"] = value

    return property(read, write)
