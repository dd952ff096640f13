"""Stages of a mitigation inside a pipeline call: prompt embedding, initial noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from memfree.conditions import TextConditions
from memfree.data.random_streams import GuardStream, torch_generator
from memfree.guidance.mitigation import Mitigation, Start
from memfree.pipeline_guard.hook import Draw, View, usable
from memfree.pipeline_guard.noise_level import NoiseLevels


def sources(
    seed: int, images: Sequence[int], attempt: int, purpose: GuardStream
) -> list[torch.Generator]:
    """One CPU generator an image, from (seed, image, attempt, purpose) alone."""
    return [torch_generator(seed, image, attempt, purpose) for image in images]


class Stages:
    """The pre-hook on the denoiser that runs ``embedding`` and ``initial_noise`` at the first step.

    Only there everything is known: the noise, the encoded prompts, and whatever else the denoiser
    is told. New embeddings replace the pipeline's at every call of the denoiser; new noise is
    written into the tensor that the pipeline steps.

    Args:
        draw: the pipeline call.
        mitigation: whose stages these are.
        generators: one CPU generator a sample.
    """

    def __init__(
        self, draw: Draw, mitigation: Mitigation, generators: Sequence[torch.Generator]
    ) -> None:
        self.draw = draw
        self.mitigation = mitigation
        self.generators = generators
        self.latents: Tensor | None = None
        self._embedding: TextConditions | None = None
        self._started = False

    def before(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The forward pre-hook."""
        family, arguments = self.draw.family, None
        if not self._started:
            self._started = True
            own = self.draw.own_randomness("the start", [self.mitigation])
            with torch.inference_mode(False), torch.no_grad(), own:
                arguments = usable(self.draw.bound(args, kwargs))
                noise = self._start(arguments)
            if noise is not None:
                arguments[family.sample] = self._replace_noise(arguments[family.sample], noise)
        if self._embedding is not None:
            arguments = arguments or self.draw.bound(args, kwargs)
            everyone = family.conditions(arguments)
            kept = everyone[slice(0, len(everyone) - len(self._embedding))]
            both = TextConditions.cat([kept, self._embedding]) if len(kept) else self._embedding
            arguments = family.told(arguments, both)
        return None if arguments is None else self.draw.as_called(arguments)

    def _start(self, arguments: dict[str, Any]) -> Tensor | None:
        """Run both stages; the new noise, or None where it stays."""
        draw = self.draw
        level = NoiseLevels(draw.pipe.scheduler, draw.family.flow).next(arguments["timestep"])
        view = draw.view(arguments, level)
        start = Start(
            noise=self._noise(view),
            conditions=view.conditions,
            unconditional=self._unconditional(view),
            denoise=lambda noise, conditions: view.denoise(self._scaled(noise), conditions),
            alpha_bar=level.alpha_bar,
            prediction_type=view.prediction_type,
            guidance_scale=view.scale,
            generators=self.generators,
        )
        conditions = self.mitigation.embedding(start)
        if conditions is not start.conditions:
            self._refuse(draw.family.flow, "the prompt's embedding")
            like = start.conditions.embeddings
            self._embedding = usable(conditions.to(like.device, like.dtype))
            start = replace(start, conditions=self._embedding)
        noise = self.mitigation.initial_noise(start)
        if noise is start.noise:
            return None
        self._refuse(not self._draws_noise, "the initial noise")
        return noise.detach()

    def _refuse(self, refused: bool, what: str) -> None:
        if refused:
            raise ValueError(
                f"memfree.guard: {type(self.mitigation).__name__} changes {what}, which is not "
                f"defined for {type(self.draw.pipe).__name__}: it starts from ε prediction of "
                "pure noise"
            )

    def _noise(self, view: View) -> Tensor:
        """x_T as it was drawn; where it is none that changes, the sample of the first step."""
        if not self._draws_noise:
            return view.x_t.clone()
        assert self.latents is not None, "prepare_latents was not seen"
        return usable(self.latents) / self.draw.pipe.scheduler.init_noise_sigma

    def _scaled(self, noise: Tensor) -> Tensor:
        """The denoiser's input at the first step, of any noise."""
        scheduler = self.draw.pipe.scheduler
        if not self._draws_noise:
            return noise
        return torch.as_tensor(
            scheduler.scale_model_input(noise * scheduler.init_noise_sigma, scheduler.timesteps[0])
        )

    @property
    def _draws_noise(self) -> bool:
        """Whether sampling starts from pure noise in the terms of a diffusion model."""
        return not (self.draw.family.flow or self.draw.family.from_image)

    def _unconditional(self, view: View) -> TextConditions:
        family = self.draw.family
        if view.twice:
            return family.conditions(view.arguments)[slice(0, view.count)]
        like = view.conditions.embeddings
        empty = family.encode(self.draw.pipe, [""], self.draw.call, like.shape[1])
        return empty.to(like.device, like.dtype).expand(view.count)

    def _replace_noise(self, sample: Tensor, noise: Tensor) -> Tensor:
        """Write x_T where the pipeline keeps it; the denoiser's input that goes with it."""
        latents = self.latents
        assert latents is not None, "prepare_latents was not seen"
        latents.copy_(noise.to(latents) * self.draw.pipe.scheduler.init_noise_sigma)
        scaled = self._scaled(noise.to(latents))
        return torch.cat([scaled] * (len(sample) // len(latents)))
