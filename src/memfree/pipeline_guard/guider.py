"""Guidance as a diffusers guider, for modular Stable Diffusion XL pipelines."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor

from memfree.conditions import TextConditions
from memfree.guidance import Guidance
from memfree.pipeline_guard.decode import Decoder
from memfree.pipeline_guard.denoiser import Signature
from memfree.pipeline_guard.families import StableDiffusionXL
from memfree.pipeline_guard.hook import Draw, mapped, usable
from memfree.pipeline_guard.noise_level import check_scheduler
from memfree.pipeline_guard.report import GuardReport
from memfree.retrieval import ReferenceIndex


class AntiMemorizationGuider(ClassifierFreeGuidance):
    """Classifier-free guidance that passes each prediction through guidances such as AMG.

    It needs a modular Stable Diffusion XL pipeline, from which, with a hook on its denoiser, it
    gets x_t and conditions. It sees no finished images, so it neither judges nor redraws (audit the
    images, or guard a ``StableDiffusionXLPipeline``). Of a mitigation it runs only guidances, and
    it is not saved with the pipeline. Guiders are experimental in diffusers.

    Args:
        pipe: with loaded components; then call ``pipe.update_components(guider=guider)``.
        index: calibrated references on the pipeline's device.
        guidance: one or several, in order.
        guidance_scale: s_0; at 1 only the conditional prediction is used.
        decoder: a cheaper autoencoder of the same latents, as in ``guard``, on the same device.
        chunk_size: latents decoded at a time; None: the whole batch.

    Attributes:
        report: its trace is filled by each pipeline call; it has no verdicts.
    """

    def __init__(
        self,
        pipe: Any,
        index: ReferenceIndex,
        guidance: Guidance | Sequence[Guidance],
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        decoder: Any = None,
        chunk_size: int | None = None,
    ) -> None:
        if not type(pipe).__name__.startswith("StableDiffusionXLModular"):
            raise ValueError(
                "AntiMemorizationGuider is for modular Stable Diffusion XL pipelines, not "
                f"{type(pipe).__name__}: its denoiser is given other arguments"
            )
        super().__init__(guidance_scale=guidance_scale, guidance_rescale=guidance_rescale)
        check_scheduler(pipe.scheduler, flow=False)
        self.report = GuardReport()
        self._pipe = pipe
        self._guidances = list(guidance) if isinstance(guidance, Sequence) else [guidance]
        self._decoder = Decoder(pipe.vae, index, chunk_size, decoder)
        self._draw: Draw | None = None
        self._calls: list[dict[str, Any]] = []
        self._handle: Any = None

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Set the step; step 0 begins another pipeline call."""
        super().set_state(step, num_inference_steps, timestep)
        self._calls = []
        if step == 0:
            self._draw = None
            self.report.calls += 1

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Hook the denoiser before each branch to see its arguments."""
        super().prepare_models(denoiser)
        caller, known = threading.get_ident(), diffusers.UNet2DConditionModel
        signature = Signature(denoiser, known, ("sample", "timestep", "encoder_hidden_states"))

        def seen(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if threading.get_ident() == caller:  # others may share the denoiser
                self._calls.append(signature.bind(args, kwargs))

        self._handle = denoiser.register_forward_hook(seen, with_kwargs=True)

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        """Remove the hook after each branch."""
        super().cleanup_models(denoiser)
        self._handle.remove()

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """The combined prediction, corrected in rows where a guidance is active."""
        plain = super().forward(pred_cond, pred_uncond)
        with torch.inference_mode(False), torch.no_grad():
            # diffusers runs the conditional branch first; a guard's batch has it last.
            branches = [branch for branch in (pred_uncond, pred_cond) if branch is not None]
            arguments = usable(mapped(_stacked, *self._calls[::-1]))
            draw = self._current_draw(twice=len(branches) == 2)
            view = draw.view(arguments, draw.levels.next(arguments["timestep"]))
            correction = draw.guided(view, usable(torch.cat(branches)))
            call = self.report.calls - 1
            self.report.add_trace(call, 0, list(range(view.count)), draw.trace.pop())
            if draw.unmoved:
                self.report.unmoved.append(call)
            if correction is None:
                return plain
            pred = usable(plain.pred).clone()
            pred[correction[0]] = correction[1]
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _current_draw(self, twice: bool) -> Draw:
        if self._draw is None:
            pipe = SimpleNamespace(
                scheduler=self._pipe.scheduler,
                unet=self._pipe.unet,
                vae=self._pipe.vae,
                _execution_device=self._pipe._execution_device,
                guidance_scale=self.guidance_scale,
                guidance_rescale=self.guidance_rescale,
                do_classifier_free_guidance=twice,
            )
            family = _Modular(components=self._pipe)
            self._draw = Draw(pipe, family, {}, self._guidances, self._decoder)
        return self._draw


@dataclass(frozen=True)
class _Modular(StableDiffusionXL):
    """Its text encoding is a pipeline block, not a method."""

    components: Any = None

    def missing_text_part(self, pipe: Any) -> str | None:
        return super().missing_text_part(self.components)

    def _encode(self, pipe: Any, captions: list[str], call: Any) -> TextConditions:
        from diffusers.modular_pipelines.stable_diffusion_xl.encoders import (
            StableDiffusionXLTextEncoderStep,
        )

        encode: Any = StableDiffusionXLTextEncoderStep.encode_prompt  # typed for one prompt
        embeddings, _, pooled, _ = encode(
            self.components,
            captions,
            device=self.components._execution_device,
            num_images_per_prompt=1,
            prepare_unconditional_embeds=False,
        )
        return TextConditions(embeddings, pooled)


def _stacked(*branches: Tensor) -> Tensor:
    """Tensors without rows are the same for all branches."""
    return torch.cat(branches) if branches[0].ndim else branches[0]
