"""Seconds a sample of every mitigation of text-to-image, on the model of ``memfree scratch``.

``python benchmarks/text_mitigations.py`` writes benchmarks/results/text_mitigations.json. Weights
are random, and most mitigations cost the more the more samples they act on: each runs with the
package's defaults (``acted``: the share of samples and steps that it changed, where it says so),
and those that act on what they take for memorized also on every sample, their full price. Without
a mitigation, and with the field's baselines, nothing is compared with an index; for amg,
multiplicity, both and reject the detection of every step is part of the price.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from harness import Records, Timing, compared, interleaved, measure
from scratch_model import (
    FULL,
    SCALE,
    TINY,
    Size,
    clock,
    device,
    sampler,
    scratch_index,
    scratch_latents,
    scratch_model,
)

from memfree.guidance import MITIGATIONS, WITH_INDEX, GuidanceSettings
from memfree.guidance.baselines import (
    PromptEmbeddingOptions,
    PromptReanchoringOptions,
    SharpnessAwareOptions,
    TextTools,
)
from memfree.sampling import SamplingModule

EVERY = "acting on every sample"
ACTING: dict[str, GuidanceSettings] = {
    "wen": GuidanceSettings("wen", wen=PromptEmbeddingOptions(target=0.0)),
    "prss": GuidanceSettings("prss", prss=PromptReanchoringOptions(trigger=0.0)),
    "prss, y_mod optimized": GuidanceSettings(
        "prss", prss=PromptReanchoringOptions(alternative="optimized", trigger=0.0)
    ),
    "sail": GuidanceSettings("sail", sail=SharpnessAwareOptions(threshold=0.0)),
    "amg": GuidanceSettings("amg", gated=False, final_correction=False),
    "both": GuidanceSettings("both", gated=False, final_correction=False),
}
"""Settings under which every sample counts as memorized: the full search or optimisation each."""


def run(tiny: bool = False) -> Records:
    """Measure; one record a mitigation (see ``harness.record``), in seconds a sample."""
    size = TINY if tiny else replace(FULL, repetitions=3)
    named: dict[str, GuidanceSettings] = {name: GuidanceSettings(name) for name in MITIGATIONS}
    named |= {f"{name}, {EVERY}": settings for name, settings in ACTING.items()}
    acted: dict[str, float | None] = {}
    functions = {
        name: _call(name, size, _module(size, settings), acted) for name, settings in named.items()
    }
    timings = interleaved(functions, size.repetitions, clock=clock())
    timings = {
        name: Timing([seconds / size.batch for seconds in timing.seconds])
        for name, timing in timings.items()
    }
    return [
        compared(
            f"scratch model: {name} / none, a sample",
            timings,
            name,
            "none",
            batch=size.batch,
            steps=size.steps,
            references=size.references,
            clock=clock().__name__,
            acted=acted[name],
        )
        for name in named
        if name != "none"
    ]


def _module(size: Size, settings: GuidanceSettings) -> SamplingModule:
    """What ``sample.py`` runs; without an index where the mitigation needs none."""
    model = scratch_model(size)
    index = scratch_index(size) if settings.mitigation in WITH_INDEX else None
    in_latents = settings.mitigation in ("multiplicity", "both")
    module = SamplingModule(
        model,
        sampler(model),
        size.steps,
        seed=1,
        guidance=settings,
        guidance_scale=SCALE,
        asked=size.prompts,
        index=index,
    ).to(device())
    # As the module does when sampling begins, but with captions to search where there is no index.
    module.mitigation = settings.for_text(
        index,
        TextTools(model.pipe.tokenizer, size.captions),
        scratch_latents(size, model) if in_latents else None,
    )
    return module


def _call(
    name: str, size: Size, module: SamplingModule, acted: dict[str, float | None]
) -> Callable[[], object]:
    def call() -> None:
        trace = module.predict_step(torch.arange(size.batch)).trace
        acted[name] = None if trace is None else float(trace["active"].float().mean())

    return call


if __name__ == "__main__":
    measure("text_mitigations", run)
