"""Guard session: draws, judges, redraws or refuses images; runs a mitigation's stages."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from memfree.conditions import TextConditions
from memfree.data.random_streams import GuardStream, torch_generator
from memfree.guidance import AntiMemorizationGuidance, Guidance
from memfree.guidance.calibration import Judge
from memfree.guidance.mitigation import Mitigation, Start, attempts
from memfree.pipeline_guard.call import (
    Call,
    as_tensor,
    check_branches,
    check_call,
    drawn_again,
    finite_rows,
    for_images,
    image_count,
    images_of,
    texts,
    without,
)
from memfree.pipeline_guard.decode import Decoder
from memfree.pipeline_guard.denoiser import watched
from memfree.pipeline_guard.families import Family, check_parts
from memfree.pipeline_guard.hook import Draw, usable
from memfree.pipeline_guard.noise_level import NoiseLevels, check_scheduler
from memfree.pipeline_guard.report import GuardReport, Verdict
from memfree.sampling.noise import OwnRandomness

OnCopy = Literal["keep", "resample", "refuse"]

_DRAW: ContextVar[Draw | None] = ContextVar("memfree_draw", default=None)
"""The current draw of this thread or task, for the pipeline's methods."""


def sources(
    seed: int, images: Sequence[int], attempt: int, purpose: GuardStream
) -> list[torch.Generator]:
    """One CPU generator per image, from (seed, image, attempt, purpose) alone."""
    return [torch_generator(seed, image, attempt, purpose) for image in images]


@dataclass
class Session:
    """Runs the calls of a guarded pipeline; see ``guard`` for the arguments."""

    kind: Any
    family: Family
    guidances: list[Guidance]
    captionless: list[Guidance] | None  # the default guidance for calls without a text encoder
    mitigation: Mitigation | None
    judge: Judge
    decoder: Decoder
    on_copy: OnCopy
    budget: int
    seed: int

    def __post_init__(self) -> None:
        self.report = GuardReport(seed=self.seed)
        self._lock = threading.Lock()
        self._randomness = OwnRandomness(self.seed)
        self._images = 0
        self._watched: WeakKeyDictionary[Any, tuple[Any, ExitStack]] = WeakKeyDictionary()

    def take(self, pipe: Any, guarded: type) -> Any:
        """Guard a pipeline until ``release``, and watch for other calls of its denoiser."""
        self._watch(pipe)
        pipe.__class__ = guarded
        return pipe

    def release(self) -> None:
        """Restore the class of each guarded pipeline, copies included."""
        for pipe in list(self._watched):
            self._leave(pipe)
            pipe.__class__ = self.kind

    @contextmanager
    def unwatched(self, pipe: Any) -> Iterator[None]:
        """Suspend the watch on a pipeline's denoiser, as for a copy of it."""
        denoiser, stack = self._watched[pipe]
        stack.close()
        try:
            yield
        finally:
            stack.enter_context(watched(denoiser, self._called_outside))

    def _watch(self, pipe: Any) -> None:
        denoiser = getattr(pipe, self.family.denoiser)
        with self._lock:
            # Copies of a pipeline share the denoiser, and with it one watch: a call counts once.
            watches = [watch for watch in self._watched.values() if watch[0] is denoiser]
            if not watches:
                watches = [(denoiser, ExitStack())]
                watches[0][1].enter_context(watched(denoiser, self._called_outside))
            self._watched[pipe] = watches[0]

    def _leave(self, pipe: Any) -> None:
        with self._lock:
            watch = self._watched.pop(pipe, None)
            if watch is not None and all(other is not watch for other in self._watched.values()):
                watch[1].close()

    def _called_outside(self) -> None:
        self.report.outside += 1
        if self.report.outside == 1:
            warnings.warn(
                f"memfree.guard: the {self.family.denoiser} of the guarded {self.kind.__name__} "
                "was called by something else, such as a pipeline that from_pipe made of it: that "
                "is neither guided nor judged; guard it as well",
                stacklevel=2,
            )

    def call(self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The pipeline's ``__call__``."""
        call = self._checked(pipe, Call.bind(self.kind, args, kwargs))
        places = list(range(image_count(call.all)))
        with self._lock:
            number, first = self.report.calls, self._images
            self.report.calls += 1
            self._images += len(places)
        verdicts: list[Verdict] = []
        fine = torch.zeros(len(places), dtype=torch.bool)
        for attempt, positions in attempts(len(places), self.budget, lambda at: ~fine[at]):
            again = positions.tolist()
            if attempt == 0:
                output, draw = self._draw(pipe, call, number, attempt, again, first)
                verdicts, fine[:] = self._judged(output, draw, call, number, again)
                continue
            part = for_images(call, self.family, again, _controlnets(pipe))
            numbers = [first + place for place in again]
            generators = sources(self.seed, numbers, attempt, GuardStream.REDRAW)
            part = part.with_(generator=generators, return_dict=True)
            if "latents" in part.given:
                part = part.with_(latents=None)
            with self._randomness.on(pipe._execution_device):
                redrawn, draw = self._draw(pipe, part, number, attempt, again, first)
                judged, fine[again] = self._judged(redrawn, draw, call, number, again)
            output = drawn_again(output, redrawn, again)
            for place, verdict in zip(again, judged, strict=True):
                reason = f"drawn again, {_why(verdicts[place])}"
                verdicts[place] = replace(verdict, draws=attempt + 1, reason=reason)
        refused = [i for i in places if self.on_copy != "keep" and verdicts[i].copy]
        for place in refused:
            draws = verdicts[place].draws
            reason = f"{_why(verdicts[place])}, after {draws} draw" + "s" * (draws > 1)
            verdicts[place] = replace(verdicts[place], refused=True, reason=reason)
        self.report.verdicts += verdicts
        return without(output, refused)

    def _checked(self, pipe: Any, call: Call) -> Call:
        check_call(call.all)
        check_parts(pipe, self.family)
        if self._watched[pipe][0] is not getattr(pipe, self.family.denoiser):
            self._leave(pipe)  # the denoiser was replaced between calls
            self._watch(pipe)
        check_scheduler(pipe.scheduler, self.family.flow)
        self.decoder.follow(pipe.vae)
        if self.mitigation is not None:
            scale = float(call.all["guidance_scale"])
            if (other := self.mitigation.guidance_scale(scale)) != scale:
                call = call.with_(guidance_scale=other)
        config = getattr(pipe, self.family.denoiser).config
        distilled = getattr(config, "time_cond_proj_dim", None) is not None
        check_branches(call.all, self._guidances(pipe), distilled)
        if (part := self.family.missing_text_part(pipe)) is not None:
            branches = not distilled and float(call.all.get("guidance_scale") or 1.0) > 1
            self._check_captions(pipe, part, branches)
        return call

    def _check_captions(self, pipe: Any, part: str, branches: bool) -> None:
        """AMG needs captions only if the pipeline makes both branches."""
        note = (
            f"The caption term of the guidance was left out: the pipeline has no {part}, which "
            "encodes the captions of near images."
        )
        if self.captionless is not None and note not in self.report.left_out:
            self.report.left_out.append(note)
        for guidance in self._guidances(pipe):
            needed = getattr(guidance, "needs_text_encoder", False)
            if needed and (branches or not isinstance(guidance, AntiMemorizationGuidance)):
                raise ValueError(
                    f"memfree.guard: {type(guidance).__name__} needs the {part} of the pipeline, "
                    "which encodes the captions of the index, and this pipeline has none: load "
                    "it, or leave out guidance that needs captions (c2=0)"
                )

    def _guidances(self, pipe: Any) -> list[Guidance]:
        own = self.guidances
        if self.captionless is not None and self.family.missing_text_part(pipe):
            own = self.captionless
        return [*(self.mitigation.guidances() if self.mitigation else ()), *own]

    def _draw(
        self, pipe: Any, call: Call, number: int, attempt: int, places: list[int], first: int
    ) -> tuple[Any, Draw]:
        mitigation, before = self.mitigation, None
        images = [first + place for place in places]
        generators = sources(self.seed, images, attempt, GuardStream.MITIGATION)
        if mitigation is not None and (prompts := texts(call.all)) is not None:
            changed = list(mitigation.prompts(prompts, generators))
            if changed != prompts:
                every = list(range(len(prompts)))
                call = for_images(call, self.family, every, _controlnets(pipe))
                call = call.with_(prompt=changed)
        draw = Draw(pipe, self.family, call.all, self._guidances(pipe), self.decoder)
        with ExitStack() as stack:
            stack.callback(_DRAW.reset, _DRAW.set(draw))
            if mitigation is not None:
                stack.enter_context(mitigation.around(draw.denoiser))
                if mitigation.changes_start():
                    before = Stages(draw, mitigation, generators).before
            stack.enter_context(draw.hooked(before))
            output = call.with_(**draw.callbacks_aside(call.given))(pipe)
        for rows in draw.trace:
            self.report.add_trace(number, attempt, places, rows)
        if draw.unmoved and number not in self.report.unmoved:
            self.report.unmoved.append(number)
        return output, draw

    def prepared(self, pipe: Any, latents: Any) -> Any:
        """Record what ``prepare_latents`` returned, and check its size."""
        # Inpainting pipelines also return the noise, and the given image's latents if the denoiser
        # does not see them.
        x_T, *others = latents if isinstance(latents, tuple) else (latents,)
        height, width = (pipe.vae_scale_factor * side for side in x_T.shape[2:])
        image = torch.zeros(1, 3, height, width, device=self.judge.index.device)
        self.decoder.check_size(image)
        if (draw := _DRAW.get()) is not None:
            draw.latents = x_T
            if len(others) == 2:
                draw.given = others[1]
        return latents

    def masked(self, mask_and_image: Any) -> Any:
        """Record what ``prepare_mask_latents`` returned."""
        if (draw := _DRAW.get()) is not None:
            draw.mask = mask_and_image[0]
        return mask_and_image

    def postprocessed(self, images: Any) -> None:
        """Record which images are finite: in the output, NaN is black and ∞ white."""
        if (draw := _DRAW.get()) is not None and isinstance(images, Tensor):
            draw.finite_images = finite_rows(images).cpu()

    def _judged(
        self, output: Any, draw: Draw, call: Call, number: int, places: list[int]
    ) -> tuple[list[Verdict], Tensor]:
        """Verdicts of the images, and which of them (n,) bool need no redraw."""
        images, judge = images_of(output), self.judge
        if len(images) != len(places):
            raise ValueError(
                f"memfree.guard: {self.kind.__name__} returned {len(images)} images, where prompt "
                f"and num_images_per_prompt ask for {len(places)}"
            )
        self.decoder.follow(draw.pipe.vae)
        finished = draw.finished or draw.last is None
        kind = call.all.get("output_type") or "pil"
        size = self.decoder.chunk_size or len(images)
        part = "judging latents" if kind == "latent" or not finished else "judging"
        mitigations = [] if self.mitigation is None else [self.mitigation]
        with draw.own_randomness(part, mitigations, self._randomness):
            pixels, finite = self._pixels(images, draw, kind, finished)
            self.decoder.check_size(pixels)
            pixels = pixels.nan_to_num(0.0)
            accepted = torch.ones(len(images), dtype=torch.bool)
            with self.decoder.explained("judging", len(images)):
                sigma, row, p_value, copy = judge(pixels, size)
                for mitigation in mitigations:
                    parts = [mitigation.accept(pieces) for pieces in pixels.split(size)]
                    accepted = torch.cat(parts).cpu()
        rate, nan = judge.false_positive_rate, float("nan")
        verdicts = [
            Verdict(
                call=number,
                image=place,
                nearest=judge.index.keys[int(row[i])] if finite[i] else "",
                similarity=float(sigma[i]) if finite[i] else nan,
                threshold=judge.threshold,
                false_positive_rate=rate,
                rate_text=judge.calibration.rate_text(rate),
                p_value=float(p_value[i]) if finite[i] else nan,
                copy=bool(finite[i] & copy[i]),
                finite=bool(finite[i]),
                finished=finished,
            )
            for i, place in enumerate(places)
        ]
        # There is no verdict on an image that is not finite: it is returned unchanged.
        again = ~accepted | copy if self.on_copy == "resample" else ~accepted
        return verdicts, ~(again & finite)

    def _pixels(self, images: Any, draw: Draw, kind: str, finished: bool) -> tuple[Tensor, Tensor]:
        """The images to judge, in [−1, 1], and which of them (n,) bool are finite."""
        device = self.judge.index.device
        if finished:
            pixels = as_tensor(images, kind, self.decoder, device)
        else:
            assert draw.last is not None
            with torch.no_grad():
                pixels = self.decoder.finished(draw.last.clean_estimate()).to(device)
        finite, seen = finite_rows(pixels).cpu(), draw.finite_images
        if seen is not None and len(seen) == len(pixels):
            # Guidances saw 0 for NaN; only the pipeline's own images still tell.
            finite = seen if finished else finite & seen
        if isinstance(images, Tensor):
            finite = finite & finite_rows(images).cpu()
        return pixels, finite


def _controlnets(pipe: Any) -> int:
    return len(getattr(getattr(pipe, "controlnet", None), "nets", [None]))


def _why(verdict: Verdict) -> str:
    if verdict.copy:
        return f"a copy of {verdict.nearest} (similarity {verdict.similarity:.3f})"
    return "not accepted by the mitigation"


@dataclass
class Stages:
    """Runs ``embedding`` and ``initial_noise`` at the denoiser's first call, when all is known."""

    draw: Draw
    mitigation: Mitigation
    generators: Sequence[torch.Generator]  # on the CPU, one per sample
    _embedding: TextConditions | None = None
    _started: bool = False

    def __post_init__(self) -> None:
        # Whether sampling starts from pure noise in the terms of a diffusion model.
        self._draws_noise = not (self.draw.family.flow or self.draw.family.from_image)

    def before(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook: the changed arguments, or None."""
        family, arguments = self.draw.family, None
        if not self._started:
            self._started = True
            random = self.draw.own_randomness("the start", [self.mitigation])
            with torch.inference_mode(False), torch.no_grad(), random:
                arguments = usable(self.draw.bound(args, kwargs))
                noise = self._start(arguments)
            if noise is not None and (latents := self.draw.latents) is not None:
                # Written where the pipeline keeps x_T; the denoiser's input must match.
                latents.copy_(noise.to(latents) * self.draw.pipe.scheduler.init_noise_sigma)
                scaled = self._scaled(noise.to(latents))
                copies = len(arguments[family.sample]) // len(latents)
                arguments[family.sample] = torch.cat([scaled] * copies)
        if self._embedding is not None:
            arguments = arguments or self.draw.bound(args, kwargs)
            own = family.conditions(arguments)
            kept = own[slice(0, len(own) - len(self._embedding))]
            both = TextConditions.cat([kept, self._embedding]) if len(kept) else self._embedding
            arguments = family.told(arguments, both)
        return None if arguments is None else self.draw.as_called(arguments)

    def _start(self, arguments: dict[str, Any]) -> Tensor | None:
        draw, scheduler = self.draw, self.draw.pipe.scheduler
        level = NoiseLevels(scheduler, draw.family.flow).next(arguments["timestep"])
        view = draw.view(arguments, level)
        noise = view.x_t.clone()  # if none is drawn, the sample of the first step
        if self._draws_noise:
            assert draw.latents is not None, "prepare_latents was not seen"
            noise = usable(draw.latents) / scheduler.init_noise_sigma
        like = view.conditions.embeddings
        if view.twice:
            unconditional = draw.family.conditions(arguments)[slice(0, view.count)]
        else:
            empty = draw.family.encode(draw.pipe, [""], draw.call, like.shape[1])
            unconditional = empty.to(like.device, like.dtype).expand(view.count)
        start = Start(
            noise=noise,
            conditions=view.conditions,
            unconditional=unconditional,
            denoise=lambda noise, conditions: view.denoise(self._scaled(noise), conditions),
            alpha_bar=level.alpha_bar,
            prediction_type=view.prediction_type,
            guidance_scale=view.scale,
            generators=self.generators,
        )
        conditions = self.mitigation.embedding(start)
        if conditions is not start.conditions:
            self._check_defined(not draw.family.flow, "the prompt's embedding")
            self._embedding = usable(conditions.to(like.device, like.dtype))
            start = replace(start, conditions=self._embedding)
        noise = self.mitigation.initial_noise(start)
        if noise is start.noise:
            return None
        self._check_defined(self._draws_noise, "the initial noise")
        return noise.detach()

    def _check_defined(self, defined: bool, what: str) -> None:
        if not defined:
            raise ValueError(
                f"memfree.guard: {type(self.mitigation).__name__} changes {what}, which is not "
                f"defined for {type(self.draw.pipe).__name__}: it starts from ε prediction of "
                "pure noise"
            )

    def _scaled(self, noise: Tensor) -> Tensor:
        scheduler = self.draw.pipe.scheduler
        if not self._draws_noise:
            return noise
        scaled = noise * scheduler.init_noise_sigma
        return torch.as_tensor(scheduler.scale_model_input(scaled, scheduler.timesteps[0]))
