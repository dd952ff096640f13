"""A guarded block: every call of the pipeline is drawn, judged, drawn again or refused."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from memfree.guidance import Calibration, Guidance, Similarity
from memfree.guidance.mitigation import Mitigation
from memfree.retrieval import ReferenceIndex
from memfree.sampling.guard.arguments import (
    check_branches,
    check_call,
    for_images,
    image_count,
    texts,
)
from memfree.sampling.guard.decode import Decoder, check_size, explained_chunks
from memfree.sampling.guard.families import Family
from memfree.sampling.guard.hook import Draw
from memfree.sampling.guard.images import (
    as_tensor,
    images_of,
    put,
    put_flags,
    with_images,
    without,
)
from memfree.sampling.guard.noise_level import check_scheduler
from memfree.sampling.guard.report import GuardReport, Verdict
from memfree.sampling.guard.stages import Stages, sources

OnCopy = Literal["keep", "resample", "refuse"]
_REDRAW, _MITIGATION = 0, 1
"""What random numbers are for: another draw's noise, a mitigation's own."""


@dataclass
class Judge:
    """Measures finished images against the index."""

    index: ReferenceIndex
    similarity: Similarity
    calibration: Calibration
    false_positive_rate: float
    chunk_size: int | None

    def verdicts(self, images: Tensor, call: int, places: Sequence[int]) -> list[Verdict]:
        """One an image (n, C, H, W) in [−1, 1]; they are these places of the call."""
        check_size(self.index, images)
        threshold = self.calibration.threshold(self.false_positive_rate)
        rate_text = self.calibration.rate_text(self.false_positive_rate)
        sigmas, rows = [], []
        with torch.no_grad(), explained_chunks("judging", len(images), self.chunk_size):
            for part in images.split(self.chunk_size or len(images)):
                match = self.similarity(self.index, part)
                sigmas.append(match.sigma.cpu())
                rows += match.rows[:, 0].tolist()
        sigma = torch.cat(sigmas)
        p_values = self.calibration.p_values(sigma).tolist()
        return [
            Verdict(
                call=call,
                image=place,
                nearest=self.index.keys[rows[i]],
                similarity=float(sigma[i]),
                threshold=threshold,
                false_positive_rate=self.false_positive_rate,
                rate_text=rate_text,
                p_value=p_values[i],
                copy=float(sigma[i]) > threshold,
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
        self.mitigation = mitigation
        self.judge = judge
        self.decoder = decoder
        self.on_copy = on_copy
        self.budget = budget
        self.seed = seed
        self.report = GuardReport()
        self._stages: Stages | None = None

    def call(self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The pipeline's ``__call__``."""
        bound = inspect.signature(self.kind.__call__).bind(pipe, *args, **kwargs)
        bound.apply_defaults()
        call = dict(bound.arguments)
        del call["self"]
        call.update(call.pop("kwargs", {}))
        check_call(call, self.family)
        check_scheduler(pipe.scheduler, self.family.flow)
        if self.mitigation is not None:
            call["guidance_scale"] = self.mitigation.guidance_scale(float(call["guidance_scale"]))
        check_branches(call, self._guidances())
        number, first = self.report.calls, len(self.report.verdicts)
        self.report.calls += 1
        places = list(range(image_count(call)))
        output = self._draw(pipe, call, number, 0, places, first)
        images, verdicts, kept = self._judged(output, call, number, places, pipe)
        draws = 1
        while draws < self.budget and not all(kept):
            again = [place for place in places if not kept[place]]
            part = {**for_images(call, again), "return_dict": True}
            part["generator"] = sources(self.seed, [first + i for i in again], draws, _REDRAW)
            if "latents" in part:
                part["latents"] = None
            redrawn = self._draw(pipe, part, number, draws, again, first)
            others, judged, accepted = self._judged(redrawn, call, number, again, pipe)
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

    def prepared(self, pipe: Any, latents: Tensor) -> Tensor:
        """What ``prepare_latents`` returned, before the pipeline goes on with it.

        Raises:
            ValueError: the index cannot be compared with images of this size.
        """
        height, width = (pipe.vae_scale_factor * side for side in latents.shape[2:])
        image = torch.zeros(1, 3, height, width, device=self.judge.index.device)
        check_size(self.judge.index, image)
        if self._stages is not None:
            self._stages.latents = latents
        return latents

    def _judged(
        self, output: Any, call: dict[str, Any], number: int, places: list[int], pipe: Any
    ) -> tuple[Any, list[Verdict], list[bool]]:
        """Images, their verdicts, and which of them need no further draw."""
        images = images_of(output)
        device = self.judge.index.device
        finished = as_tensor(images, call.get("output_type") or "pil", self.decoder, device)
        verdicts = self.judge.verdicts(finished, number, places)
        kept = [True] * len(places)
        if self.mitigation is not None:
            kept = self._accepted(self.mitigation, finished)
        if self.on_copy == "resample":
            kept = [fine and not verdict.copy for fine, verdict in zip(kept, verdicts, strict=True)]
        return images, verdicts, kept

    def _accepted(self, mitigation: Mitigation, finished: Tensor) -> list[bool]:
        """Which finished images the mitigation keeps."""
        size = self.judge.chunk_size
        with explained_chunks("judging", len(finished), size):
            parts = finished.split(size or len(finished))
            return torch.cat([mitigation.accept(part) for part in parts]).tolist()

    def _draw(
        self,
        pipe: Any,
        call: dict[str, Any],
        number: int,
        attempt: int,
        places: list[int],
        first: int,
    ) -> Any:
        """One call of the pipeline's own ``__call__`` with the hooks on its denoiser."""
        guidances = self._guidances()
        generators = sources(self.seed, [first + i for i in places], attempt, _MITIGATION)
        if self.mitigation is not None:
            call = self._prompts(call, generators)
        draw = Draw(pipe, self.family, call, guidances, self.decoder)
        denoiser = draw.denoiser
        with ExitStack() as stack:
            if self.mitigation is not None:
                self._stages = Stages(draw, self.mitigation, generators)
                stack.callback(setattr, self, "_stages", None)
                stack.enter_context(self.mitigation.around(denoiser))
                stack.enter_context(
                    denoiser.register_forward_pre_hook(self._stages.before, with_kwargs=True)
                )
            stack.enter_context(denoiser.register_forward_hook(draw.after, with_kwargs=True))
            output = self.kind.__call__(pipe, **call)
        for rows in draw.trace:
            self.report.add_trace(number, attempt, places, rows)
        if draw.unmoved and number not in self.report.unmoved:
            self.report.unmoved.append(number)
        return output

    def _guidances(self) -> list[Guidance]:
        """Those of the mitigation first."""
        return [*(self.mitigation.guidances() if self.mitigation else ()), *self.guidances]

    def _prompts(self, call: dict[str, Any], generators: list[torch.Generator]) -> dict[str, Any]:
        """The call with the mitigation's prompts, one an image where they are new."""
        assert self.mitigation is not None
        before = texts(call)
        if before is None:
            return call
        after = self.mitigation.prompts(before, generators)
        if list(after) == before:
            return call
        return {**for_images(call, list(range(len(before)))), "prompt": list(after)}


def _why(verdict: Verdict) -> str:
    if verdict.copy:
        return f"a copy of {verdict.nearest} (similarity {verdict.similarity:.3f})"
    return "not accepted by the mitigation"
