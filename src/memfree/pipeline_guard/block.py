"""``memfree.guard``: guidance and verdicts for each diffusers pipeline call in a ``with`` block."""

from __future__ import annotations

import copy
import functools
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, ParamSpec, get_args

from memfree.data.split import DEFAULT_RATE
from memfree.guidance import MITIGATIONS, Guidance, GuidanceSettings
from memfree.guidance.baselines import TextTools
from memfree.guidance.calibration import Judge, calibration_of, default_similarity
from memfree.guidance.mitigation import Mitigation, mitigation_at
from memfree.guidance.options import is_import_path
from memfree.pipeline_guard.call import Watched
from memfree.pipeline_guard.decode import Decoder
from memfree.pipeline_guard.families import family_of
from memfree.pipeline_guard.noise_level import check_scheduler
from memfree.pipeline_guard.report import GuardReport
from memfree.pipeline_guard.session import OnCopy, Session
from memfree.retrieval import ReferenceIndex

_P = ParamSpec("_P")


class Guarding(ContextDecorator, AbstractContextManager[GuardReport]):
    """Result of ``guard``: a decorator or context manager with a new report for each block."""

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

    A forward hook on the denoiser passes each prediction through the guidance (Chen, Liu, Xu, 2024,
    eq. 10), and finished images are compared with the index. Prompts, schedulers, LoRAs, batches
    and generators work as before; without active guidance, images are bit-identical. Supported:
    Stable Diffusion 1, 2 and XL with their img2img, inpainting and ControlNet pipelines, latent
    consistency models, PixArt, and Stable Diffusion 3 with its img2img pipeline.

    Copies of the pipeline made in the block are guarded until it ends; for other pipelines that
    share the denoiser (``from_pipe``), a warning and the report say that they are not. The pipeline
    is restored after the block, also after an exception.

    Args:
        index: calibrated references; moved, like ``decoder`` and ``latents``, to the pipeline's
            device for the block.
        guidance: one, several in order, or settings, which run all stages of the mitigation they
            name. None: the recommended AMG (without its caption term if captions or a text encoder
            are missing), or only the guidances of ``mitigation``. An empty list only judges.
        mitigation: one to run with all its stages, or its import path; its guidances come first.
        on_copy: for finished images that are copies, ``keep`` returns them with their verdicts,
            ``refuse`` returns None instead, ``resample`` redraws them with other seeds and refuses
            what is still a copy when the budget is spent. With a None, images are a list.
        budget: maximum draws of an image, the first included, for ``resample`` and for images that
            the mitigation rejects (``reject`` in settings has its own).
        false_positive_rate: of the verdicts and, if they leave it at its default, guidance
            settings; within the range of the index's calibration.
        decoder: a cheaper autoencoder of the same latents for clean estimates, such as
            ``AutoencoderTiny``. Guidance may start at another step. The last step's correction and
            the verdicts use the pipeline's own.
        chunk_size: latents decoded and finished images judged at a time; None: the whole batch. All
            images of a sampling step are embedded together.
        seed: for redraws and the mitigation; first draws use the call's generators. None: a new one
            for each block, in ``report.seed``.
        latents: references in the denoiser's latent space for multiplicity guidance.

    Yields:
        The report with trace and verdicts, filled by each pipeline call.

    Raises:
        ValueError: pipeline, scheduler or arguments are unsupported, or the index is not
            calibrated.
        torch.OutOfMemoryError: in one line that names the options that lower the memory.
    """
    if seed is None:
        seed = secrets.randbits(63)  # not from torch's generator, which is the caller's
    rate, given = false_positive_rate, mitigation
    if isinstance(given, str) and is_import_path(given):
        given = mitigation_at(given)
    _check_kinds(guidance, given, on_copy, budget, seed, chunk_size, rate, index, latents)
    assert not isinstance(given, str)
    kind = type(pipe)
    if getattr(kind, "_memfree_guarded", False):
        raise ValueError("memfree.guard: this pipeline is guarded already; guards do not nest")
    family = family_of(pipe)
    check_scheduler(pipe.scheduler, family.flow)
    similarity = default_similarity(index)
    judge = Judge(index, similarity, calibration_of(index, similarity), false_positive_rate)
    judge.calibration.threshold(false_positive_rate)  # refuses a rate that it does not allow
    if isinstance(guidance, GuidanceSettings):
        if guidance.false_positive_rate == DEFAULT_RATE:
            guidance = replace(guidance, false_positive_rate=false_positive_rate)
        _check_settings(guidance, index, latents)
    decode = Decoder(pipe.vae, index, chunk_size, decoder, latents)
    with _moved(pipe._execution_device, decoder, index, latents):
        if isinstance(guidance, GuidanceSettings):
            budget = guidance.budget if guidance.mitigation == "reject" else budget
            tokenizer = getattr(pipe, "tokenizer", None) or getattr(pipe, "tokenizer_2", None)
            tools = None if tokenizer is None else TextTools.of(tokenizer, index)
            given = guidance.for_text(index, tools, latents)
            guidance = None
        guidances: list[Guidance] = []
        captionless: list[Guidance] | None = None
        if guidance is not None:
            guidances = list(guidance) if isinstance(guidance, Sequence) else [guidance]
        elif given is None:
            amg = GuidanceSettings("amg", false_positive_rate)
            guidances = [replace(amg, c2=0.0).anti_memorization(index)]
            if index.captions is not None:
                captionless, guidances = guidances, [amg.anti_memorization(index)]
        session = Session(
            kind, family, guidances, captionless, given, judge, decode, on_copy, budget, seed
        )
        session.take(pipe, _guarded(kind, session))
        try:
            yield session.report
        finally:
            session.release()


def _check_kinds(
    guidance: Any,
    mitigation: Any,
    on_copy: Any,
    budget: Any,
    seed: Any,
    chunk_size: Any,
    rate: Any,
    index: Any,
    latents: Any,
) -> None:
    def whole(value: Any, least: int) -> bool:
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        return is_whole and int(value) >= least

    def guides(value: Any) -> bool:
        return callable(value) and not isinstance(value, (type, Mitigation))

    settings = isinstance(guidance, GuidanceSettings)
    several = isinstance(guidance, Sequence) and not isinstance(guidance, str)
    guidances = guidance if several else [] if settings or guidance is None else [guidance]
    in_range = isinstance(rate, Real) and 0 < float(rate) < 1
    a_number, an_index = "a whole number of at least", "a ReferenceIndex"
    for name, value, fine, kind in (
        ("on_copy", on_copy, on_copy in get_args(OnCopy), "keep, resample or refuse"),
        ("budget", budget, whole(budget, 1), f"{a_number} 1"),
        ("seed", seed, whole(seed, 0), f"{a_number} 0"),
        ("chunk_size", chunk_size, chunk_size is None or whole(chunk_size, 1), f"{a_number} 1"),
        ("false_positive_rate", rate, in_range, "a number between 0 and 1"),
        ("index", index, isinstance(index, ReferenceIndex), an_index),
        ("latents", latents, isinstance(latents, ReferenceIndex | None), an_index),
        ("mitigation", mitigation, isinstance(mitigation, Mitigation | None), "a Mitigation"),
        *(
            ("guidance", value, guides(value), "a guidance, a list of them, or GuidanceSettings")
            for value in guidances
        ),
    ):
        if fine:
            continue
        instead = ""
        if kind is an_index:
            instead = ": give ReferenceIndex.load(folder)"
        elif isinstance(value, Mitigation):
            instead = ": give it as mitigation="
        elif isinstance(value, type):
            instead = ": give an instance of it"
        elif isinstance(value, str) and value in MITIGATIONS:
            instead = f": give guidance=GuidanceSettings({value!r})"
        raise ValueError(f"memfree.guard: {name} must be {kind}, not {value!r}{instead}")
    if settings and mitigation is not None:
        raise ValueError("memfree.guard: give guidance settings or a mitigation, not both")


def _check_settings(
    settings: GuidanceSettings, index: ReferenceIndex, latents: ReferenceIndex | None
) -> None:
    if settings.needs_captions and index.captions is None:
        raise ValueError(
            "memfree.guard: the index has no captions, which c2 steers away from: build it on "
            "captioned images, or give c2=0"
        )
    multiplicity = settings.mitigation in ("multiplicity", "both")
    if multiplicity and latents is None:
        raise ValueError(
            f"memfree.guard: the mitigation {settings.mitigation} needs latents=, an index that "
            "`memfree index --features latents` wrote"
        )
    if multiplicity and latents is not None and latents.captions is None:
        raise ValueError(
            "memfree.guard: latents= has no captions, which tell the references of a prompt: build "
            "it on captioned images"
        )


@contextmanager
def _moved(device: Any, decoder: Any, *indexes: ReferenceIndex | None) -> Iterator[None]:
    home = None if decoder is None else decoder.device
    homes = [(index, index.device, index.features.device) for index in indexes if index is not None]
    try:
        if decoder is not None:
            decoder.to(device)
        for index, _, _ in homes:
            index.to(device)
        yield
    finally:
        if decoder is not None:
            decoder.to(home)
        for index, vectors, weights in homes:
            index.to(vectors)
            if weights is not None:  # they may be the pipeline's own autoencoder
                index.features.to(weights)


def _guarded(kind: Any, session: Session) -> type:
    class Guarded(kind):  # type: ignore[misc]
        __module__, __qualname__, __doc__ = kind.__module__, kind.__qualname__, kind.__doc__
        _memfree_guarded = True

        @functools.wraps(kind.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if type(self) is not Guarded:  # a method kept beyond the block
                return kind.__call__(self, *args, **kwargs)
            return session.call(self, args, kwargs)

        @functools.wraps(kind.prepare_latents)
        def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
            return session.prepared(self, kind.prepare_latents(self, *args, **kwargs))

        if hasattr(kind, "prepare_mask_latents"):

            @functools.wraps(kind.prepare_mask_latents)
            def prepare_mask_latents(self, *args: Any, **kwargs: Any) -> Any:
                return session.masked(kind.prepare_mask_latents(self, *args, **kwargs))

        if hasattr(kind, "load_lora_weights"):  # PixArt's pipelines have none

            @functools.wraps(kind.load_lora_weights)
            def load_lora_weights(self, *args: Any, **kwargs: Any) -> None:
                with _adapters_that_fit(self, kind.__name__):
                    kind.load_lora_weights(self, *args, **kwargs)

        @property
        def image_processor(self) -> Watched:
            if "image_processor" not in vars(self):
                raise AttributeError(f"{type(self).__name__} has no image_processor")
            return Watched(vars(self)["image_processor"], session.postprocessed)

        @image_processor.setter
        def image_processor(self, value: Any) -> None:
            self.__dict__["image_processor"] = value

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            # A pipeline created in the block, as by `pipe.from_pipe`, is an ordinary one.
            return kind(*args, **kwargs)

        def __copy__(self) -> Any:
            other = object.__new__(kind)
            vars(other).update(vars(self))
            return session.take(other, Guarded)

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            memo[id(self)] = other = object.__new__(kind)
            with session.unwatched(self):  # or the copy of the denoiser would keep our hook
                vars(other).update(copy.deepcopy(vars(self), memo))
            return session.take(other, Guarded)

        def __reduce_ex__(self, protocol: Any) -> Any:
            return object.__new__, (kind,), vars(self)  # what is pickled is an ordinary pipeline

    Guarded.__name__ = kind.__name__
    return Guarded


@contextmanager
def _adapters_that_fit(pipe: Any, name: str) -> Iterator[None]:
    def adapters() -> set[str]:
        return {adapter for part in pipe.get_list_adapters().values() for adapter in part}

    before = adapters()
    try:
        yield
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        if new := sorted(adapters() - before):
            pipe.delete_adapters(new)
        raise ValueError(
            f"memfree.guard: the LoRA does not fit this {name}: it was trained for a model of "
            "other shapes"
        ) from error
