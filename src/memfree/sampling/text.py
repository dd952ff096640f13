"""A batch of text-to-image samples, drawn through all stages of a mitigation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from memfree.conditions import TextConditions
from memfree.diffusion_math import alpha_bar_at
from memfree.guidance import Mitigation, Start
from memfree.models import LoadedModel
from memfree.sampling.loop import Result, sample


def sample_text(
    model: LoadedModel,
    mitigation: Mitigation,
    prompts: Sequence[str],
    noise: Tensor,
    scheduler: Any,
    steps: int,
    guidance_scale: float,
    generators: list[torch.Generator],
    one_call: bool = True,
) -> Result:
    """Draw one image a prompt: prompts, embedding, initial noise, network, prediction.

    Args:
        model: a text-to-image model.
        mitigation: whose stages are run; ``accept`` is left to the caller.
        prompts: one a sample.
        noise: x_T (B, C, h, w), on the device.
        scheduler: a diffusers scheduler.
        steps: number of denoising steps.
        guidance_scale: s_0 of classifier-free guidance.
        generators: one a sample, for all that is drawn.
        one_call: as of ``sample``.

    Returns:
        Images (B, 3, H, W), about in [−1, 1], and the trace.
    """
    asked = mitigation.prompts(prompts, generators)
    scale = mitigation.guidance_scale(guidance_scale)
    conditions, unconditional = model.encode(asked), model.encode([""])
    first = copy.deepcopy(scheduler)
    first.set_timesteps(steps, device=noise.device)
    t = first.timesteps[0]

    def denoise(x: Tensor, y: TextConditions) -> Tensor:
        return model.denoiser(first.scale_model_input(x * first.init_noise_sigma, t), t, y)

    start = Start(
        noise=noise,
        conditions=conditions,
        unconditional=unconditional.expand(len(noise)),
        denoise=denoise,
        alpha_bar=alpha_bar_at(first, t, 0).to(noise.device),
        prediction_type=scheduler.config.prediction_type,
        guidance_scale=scale,
        generators=generators,
    )
    start = replace(start, conditions=mitigation.embedding(start))
    noise = mitigation.initial_noise(start)

    guidances = mitigation.guidances()
    with mitigation.around(model.pipe.unet):
        result = sample(
            model.denoiser,
            scheduler,
            noise,
            steps,
            guidance=guidances or None,
            conditions=start.conditions,
            guidance_scale=scale,
            trace=bool(guidances),
            generators=generators,
            decode=model.decode_estimate,
            encode=model.encode,
            # As it is saved: what is beyond white or black counts for nothing.
            decode_last=lambda latents: model.decode(latents).clamp(-1, 1),
            one_call=one_call,
        )
    with torch.no_grad():
        return Result(model.decode(result.images), result.trace)
