"""Guard session: calls drawn, judged, drawn again or refused."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from memfree.data.random_streams import GuardStream
from memfree.guidance import AntiMemorizationGuidance, Calibration, Guidance, Similarity
from memfree.guidance.mitigation import Mitigation
from memfree.pipeline_guard.call import (
    Call,
    as_tensor,
    check_branches,
    check_call,
    finite_rows,
    for_images,
    image_count,
    images_of,
    put,
    put_flags,
    texts,
    with_images,
    without,
)
from memfree.pipeline_guard.decode import Decoder, check_size, explained_chunks
from memfree.pipeline_guard.denoiser import watched
from memfree.pipeline_guard.families import Family, check_parts
from memfree.pipeline_guard.hook import Draw
from memfree.pipeline_guard.mitigation_stages import Stages, sources
from memfree.pipeline_guard.noise_level import check_scheduler
from memfree.pipeline_guard.report import GuardReport, Verdict
from memfree.retrieval import ReferenceIndex
from memfree.sampling.noise import OwnRandomness

OnCopy = Literal["keep", "resample", "refuse"]


@dataclass
class Drawing:
    """One draw of a guarded call, as the methods of its pipeline see it."""

    draw: Draw
    stages: Stages | None = None
    finite: list[Tensor] = field(default_factory=list)
    """Which images were finite when the pipeline last made an output of them, (n,) bool."""


_DRAWING: ContextVar[Drawing | None] = ContextVar("memfree_drawing", default=None)
"""The draw that this thread, or task, is in."""


@dataclass
class Judge:
    """Measures finished images against the index."""

    index: ReferenceIndex
    similarity: Similarity
    calibration: Calibration
    false_positive_rate: float
    chunk_size: int | None

    def verdicts(
        self,
        images: Tensor,
        finite: Tensor,
        finished: bool,
        call: int,
        places: Sequence[int],
    ) -> list[Verdict]:
        """What the index says of each image.

        Args:
            images: (n, C, H, W) in [−1, 1].
            finite: (n,) bool: which of them were finite before they were made an output.
            finished: whether the pipeline took its schedule's last step.
            call: number of the pipeline call.
            places: positions of the images in the call.
        """
        check_size(self.index, images)
        threshold = self.calibration.threshold(self.false_positive_rate)
        rate_text = self.calibration.rate_text(self.false_positive_rate)
        sigmas, rows = [], []
        with torch.no_grad(), explained_chunks("judging", len(images), self.chunk_size):
            for part in images.nan_to_num(0.0).split(self.chunk_size or len(images)):
                match = self.similarity(self.index, part)
                sigmas.append(match.sigma.cpu())
                rows += match.rows[:, 0].tolist()
        sigma = torch.cat(sigmas)
        finite = finite.cpu()
        p_values = self.calibration.p_values(sigma).tolist()
        return [
            Verdict(
                call=call,
                image=place,
                nearest=self.index.keys[rows[i]] if finite[i] else "",
                similarity=float(sigma[i]) if finite[i] else float("nan"),
                threshold=threshold,
                false_positive_rate=self.false_positive_rate,
                rate_text=rate_text,
                p_value=p_values[i] if finite[i] else float("nan"),
                copy=bool(finite[i]) and float(sigma[i]) > threshold,
                finite=bool(finite[i]),
                finished=finished,
            )
            for i, place in enumerate(places)
        ]


class Session:
    """What a guarded pipeline asks at its calls; see ``guard`` for the arguments."""

    def __init__(
        self,
        kind: type,
        family: Family,
        guidances: list[Guidance],
        without_captions: list[Guidance] | None,
        mitigation: Mitigation | None,
        judge: Judge,
        decoder: Decoder,
        on_copy: OnCopy,
        budget: int,
        seed: int,
    ) -> None:
        self.kind: Any = kind
        self.family = family
        self.guidances = guidances
        self.without_captions = without_captions
        self.mitigation = mitigation
        self.judge = judge
        self.decoder = decoder
        self.on_copy = on_copy
        self.budget = budget
        self.seed = seed
        self.report = GuardReport(seed=seed)
        self._lock = threading.Lock()
        self._randomness = OwnRandomness(seed)
        self._images = 0
        self._watched: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def take(self, pipe: Any, guarded: type) -> Any:
        """Guard a pipeline until ``release``, and watch who else calls its denoiser."""
        self.watch(pipe)
        pipe.__class__ = guarded
        return pipe

    def watch(self, pipe: Any) -> None:
        """Put the watch on a pipeline's denoiser."""
        denoiser = getattr(pipe, self.family.denoiser)
        with self._lock:
            # Copies of a pipeline share the denoiser, and with it one watch: a call counts once.
            others = [watch for watch in self._watched.values() if watch[0] is denoiser]
            if not others:
                stack = ExitStack()
                stack.enter_context(watched(denoiser, self._called_outside))
                others = [(denoiser, stack)]
            self._watched[pipe] = others[0]

    def leave(self, pipe: Any) -> None:
        """Take the watch off a pipeline's denoiser, unless another pipeline of ours has it too."""
        with self._lock:
            watch = self._watched.pop(pipe, None)
            if watch is not None and all(one is not watch for one in self._watched.values()):
                watch[1].close()

    @contextmanager
    def unwatched(self, pipe: Any) -> Iterator[None]:
        """Without the watch on a pipeline's denoiser, as for a copy of it."""
        denoiser, stack = self._watched[pipe]
        stack.close()
        try:
            yield
        finally:
            stack.enter_context(watched(denoiser, self._called_outside))

    def release(self) -> None:
        """Give every guarded pipeline its own class back: the one of the block and its copies."""
        for pipe in list(self._watched):
            self.leave(pipe)
            pipe.__class__ = self.kind

    def call(self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The pipeline's ``__call__``."""
        call = Call.bind(self.kind, args, kwargs)
        check_call(call.all)
        check_parts(pipe, self.family)
        if self._watched[pipe][0] is not getattr(pipe, self.family.denoiser):
            self.leave(pipe)  # the denoiser was replaced between calls
            self.watch(pipe)
        check_scheduler(pipe.scheduler, self.family.flow)
        self.decoder.follow(pipe.vae)
        if self.mitigation is not None:
            scale = float(call.all["guidance_scale"])
            if (other := self.mitigation.guidance_scale(scale)) != scale:
                call = call.with_(guidance_scale=other)
        distilled = self._is_distilled(pipe)
        check_branches(call.all, self._guidances(pipe), distilled)
        self._check_text(pipe, call, distilled)
        places = list(range(image_count(call.all)))
        with self._lock:
            number, first = self.report.calls, self._images
            self.report.calls += 1
            self._images += len(places)
        output, drawing = self._draw(pipe, call, number, 0, places, first)
        images, verdicts, kept = self._judged(output, drawing, call, number, places)
        draws = 1
        while draws < self.budget and not all(kept):
            again = [place for place in places if not kept[place]]
            part = for_images(call, self.family, again, self._controlnets(pipe))
            generators = sources(self.seed, [first + i for i in again], draws, GuardStream.REDRAW)
            part = part.with_(generator=generators, return_dict=True)
            if "latents" in part.given:
                part = part.with_(latents=None)
            with self._randomness.on(pipe._execution_device):
                redrawn, drawing = self._draw(pipe, part, number, draws, again, first)
                others, judged, accepted = self._judged(redrawn, drawing, call, number, again)
            draws += 1
            images, output = put(images, others, again), put_flags(output, redrawn, again)
            for place, verdict, fine in zip(again, judged, accepted, strict=True):
                reason = f"drawn again, {_why(verdicts[place])}"
                verdicts[place] = replace(verdict, draws=draws, reason=reason)
                kept[place] = fine
        refused = [i for i in places if self.on_copy != "keep" and verdicts[i].copy]
        for place in refused:
            verdicts[place] = replace(
                verdicts[place],
                refused=True,
                reason=f"{_why(verdicts[place])}, after {draws} draw" + "s" * (draws > 1),
            )
        self.report.verdicts += verdicts
        return with_images(output, without(images, refused))

    def prepared(self, pipe: Any, latents: Any) -> Any:
        """What ``prepare_latents`` returned, before the pipeline goes on with it.

        Inpainting pipelines return the noise as well, and the given image's latents where the
        denoiser does not see them.

        Raises:
            ValueError: the index cannot be compared with images of this size.
        """
        several = isinstance(latents, tuple)
        x_T = latents[0] if several else latents
        height, width = (pipe.vae_scale_factor * side for side in x_T.shape[2:])
        image = torch.zeros(1, 3, height, width, device=self.judge.index.device)
        check_size(self.judge.index, image)
        if (drawing := _DRAWING.get()) is not None:
            if drawing.stages is not None:
                drawing.stages.latents = x_T
            if several and len(latents) == 3:
                drawing.draw.given = latents[2]
        return latents

    def masked(self, mask_and_image: Any) -> Any:
        """What ``prepare_mask_latents`` returned."""
        if (drawing := _DRAWING.get()) is not None:
            drawing.draw.mask = mask_and_image[0]
        return mask_and_image

    def postprocessed(self, images: Any) -> None:
        """What a pipeline is about to make an output of, where NaN turns black and ∞ white."""
        drawing = _DRAWING.get()
        if drawing is not None and isinstance(images, Tensor):
            drawing.finite.append(finite_rows(images))

    def _called_outside(self) -> None:
        """Say once that something else calls the denoiser, such as an unguarded pipeline."""
        self.report.outside += 1
        if self.report.outside == 1:
            warnings.warn(
                f"memfree.guard: the {self.family.denoiser} of the guarded {self.kind.__name__} "
                "was called by something else, such as a pipeline that from_pipe made of it: that "
                "is neither guided nor judged; guard it as well",
                stacklevel=2,
            )

    def _is_distilled(self, pipe: Any) -> bool:
        """Whether the denoiser is told the guidance scale, and makes one prediction only."""
        config = getattr(pipe, self.family.denoiser).config
        return getattr(config, "time_cond_proj_dim", None) is not None

    def _controlnets(self, pipe: Any) -> int:
        """How many ControlNets feed the denoiser, each with images of its own."""
        return len(getattr(getattr(pipe, "controlnet", None), "nets", [None]))

    def _judged(
        self, output: Any, drawing: Drawing, call: Call, number: int, places: list[int]
    ) -> tuple[Any, list[Verdict], list[bool]]:
        """Images, their verdicts, and which of them need no further draw."""
        images = images_of(output)
        if len(images) != len(places):
            raise ValueError(
                f"memfree.guard: {self.kind.__name__} returned {len(images)} images, where prompt "
                f"and num_images_per_prompt ask for {len(places)}"
            )
        draw = drawing.draw
        self.decoder.follow(draw.pipe.vae)
        finished = draw.finished or draw.last is None
        kind = call.all.get("output_type") or "pil"
        with self._own_randomness(draw.pipe, decodes=kind == "latent" or not finished):
            made, finite = self._made(images, drawing, kind, finished)
            verdicts = self.judge.verdicts(made, finite, finished, number, places)
            kept = [True] * len(places)
            if self.mitigation is not None:
                # Of what is not finite nothing can be said: it is returned as it is.
                accepted = self._accepted(self.mitigation, made.nan_to_num(0.0))
                kept = [
                    fine or not one.finite for fine, one in zip(accepted, verdicts, strict=True)
                ]
        if self.on_copy == "resample":
            kept = [fine and not verdict.copy for fine, verdict in zip(kept, verdicts, strict=True)]
        return images, verdicts, kept

    def _made(
        self, images: Any, drawing: Drawing, kind: str, finished: bool
    ) -> tuple[Tensor, Tensor]:
        """What is judged, images in [−1, 1], and which of them (n,) bool are finite."""
        device = self.judge.index.device
        seen = drawing.finite[-1].cpu() if drawing.finite else None
        if finished:
            made = as_tensor(images, kind, self.decoder, device)
        else:
            assert drawing.draw.last is not None
            with torch.no_grad():
                made = self.decoder.finished(drawing.draw.last.clean_estimate()).to(device)
        finite = finite_rows(made).cpu()
        if seen is not None and len(seen) == len(made):
            # Guidances were given numbers for NaN; only the pipeline's own images still tell.
            finite = seen if finished else finite & seen
        if isinstance(images, Tensor):
            finite = finite & finite_rows(images).cpu()
        return made, finite

    def _own_randomness(self, pipe: Any, decodes: bool) -> AbstractContextManager[None]:
        """Where judging may draw, as an autoencoder might: torch's generators stay in place."""
        device, part = pipe._execution_device, "judging latents" if decodes else "judging"
        if self.mitigation is None or type(self.mitigation).__module__.startswith("memfree."):
            return self._randomness.if_drawn(device, self.decoder.draws, part)
        return self._randomness.on(device)

    def _accepted(self, mitigation: Mitigation, finished: Tensor) -> list[bool]:
        """Which finished images the mitigation keeps."""
        size = self.judge.chunk_size
        with explained_chunks("judging", len(finished), size):
            parts = finished.split(size or len(finished))
            return torch.cat([mitigation.accept(part) for part in parts]).tolist()

    def _draw(
        self,
        pipe: Any,
        call: Call,
        number: int,
        attempt: int,
        places: list[int],
        first: int,
    ) -> tuple[Any, Drawing]:
        """One call of the pipeline's own ``__call__`` with the hooks on its denoiser."""
        generators = sources(
            self.seed, [first + i for i in places], attempt, GuardStream.MITIGATION
        )
        if self.mitigation is not None:
            call = self._prompts(pipe, call, generators)
        draw = Draw(pipe, self.family, call.all, self._guidances(pipe), self.decoder)
        drawing, before = Drawing(draw), None
        with ExitStack() as stack:
            stack.callback(_DRAWING.reset, _DRAWING.set(drawing))
            if self.mitigation is not None:
                stack.enter_context(self.mitigation.around(draw.denoiser))
                if self.mitigation.changes_start():
                    drawing.stages = Stages(draw, self.mitigation, generators)
                    before = drawing.stages.before
            stack.enter_context(draw.hooked(before))
            output = call.with_(**draw.callbacks_aside(call.given))(pipe)
        for rows in draw.trace:
            self.report.add_trace(number, attempt, places, rows)
        if draw.unmoved and number not in self.report.unmoved:
            self.report.unmoved.append(number)
        return output, drawing

    def _guidances(self, pipe: Any) -> list[Guidance]:
        """Those of the mitigation first."""
        own = self.guidances
        if self.without_captions is not None and self.family.missing_text_part(pipe):
            own = self.without_captions
        return [*(self.mitigation.guidances() if self.mitigation else ()), *own]

    def _check_text(self, pipe: Any, call: Call, distilled: bool) -> None:
        """Refuse guidance that needs captions where none can be encoded, before anything is drawn.

        Raises:
            ValueError: the pipeline lacks a text encoder or a tokenizer.
        """
        part = self.family.missing_text_part(pipe)
        if part is None:
            return
        if self.without_captions is not None:
            note = (
                f"The caption term of the guidance was left out: the pipeline has no {part}, "
                "which encodes the captions of near images."
            )
            if note not in self.report.left_out:
                self.report.left_out.append(note)
        for one in self._guidances(pipe):
            branches = not distilled and float(call.all.get("guidance_scale") or 1.0) > 1
            needs_branches = isinstance(one, AntiMemorizationGuidance)
            if getattr(one, "needs_text_encoder", False) and (branches or not needs_branches):
                raise ValueError(
                    f"memfree.guard: {type(one).__name__} needs the {part} of the pipeline, which "
                    "encodes the captions of the index, and this pipeline has none: load it, or "
                    "leave out guidance that needs captions (c2=0)"
                )

    def _prompts(self, pipe: Any, call: Call, generators: list[torch.Generator]) -> Call:
        """The call with the mitigation's prompts, one an image where they are new."""
        assert self.mitigation is not None
        before = texts(call.all)
        if before is None:
            return call
        after = self.mitigation.prompts(before, generators)
        if list(after) == before:
            return call
        every = list(range(len(before)))
        return for_images(call, self.family, every, self._controlnets(pipe)).with_(
            prompt=list(after)
        )


def _why(verdict: Verdict) -> str:
    if verdict.copy:
        return f"a copy of {verdict.nearest} (similarity {verdict.similarity:.3f})"
    return "not accepted by the mitigation"
