"""Guided over unguided text-to-image sampling in latent space, by the share of active samples.

``python benchmarks/latent_guidance.py`` writes benchmarks/results/latent_guidance.json. The model
is that of ``memfree scratch``, batch 8, 25 steps of DDIM, classifier-free guidance 3; a call draws
the batch whole: prompts encoded, samples decoded. All three terms of AMG act on active samples.
The nearest caption is either never the prompt, so that each costs a call of the denoiser (eq. 16),
or always, as for a duplicated image that is asked for by its caption: then eq. 16 costs no call. A
share of 10 % is one of 8 samples in four steps of five.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from guidance import ForcedGuidance
from harness import Records, compared, interleaved, measure
from scratch_model import (
    FULL,
    SCALE,
    TINY,
    Size,
    clock,
    device,
    sampler,
    scratch_index,
    scratch_model,
)

from memfree.guidance import ConstantThreshold, EmbeddingSimilarity, Guided
from memfree.guidance.mitigation import Mitigation
from memfree.guidance.observer import EVERY_STEP, Cadence
from memfree.models import LoadedModel
from memfree.retrieval import ReferenceIndex
from memfree.sampling.module import sample_text
from memfree.sampling.noise import draw, generators

SHARES = (0.0, 0.1, 1.0)
LIMIT = 1.15
"""Goal for the ratio at 10 % active samples, with the small decoder and a cadence."""
WAYS = {
    "full decoder, every step": (False, EVERY_STEP),
    "full decoder, every 5 steps": (False, Cadence(5)),
    "small decoder, every 5 steps": (True, Cadence(5)),
    "small decoder, every 10 steps, the last tenth whole": (True, Cadence(10, always_below=0.1)),
}
"""Whether the small decoder makes the estimates, and when they are compared with the index. The
last step is always compared, through the full decoder; unless said otherwise so is every step from
time 0.3 on (``Cadence.always_below``)."""


def run(tiny: bool = False) -> Records:
    """Measure; one record a way and share (see ``harness.record``)."""
    size = TINY if tiny else FULL
    models = {small: scratch_model(size, small) for small in (False, True)}
    prompts = size.prompts[:1] * size.batch
    indexes = {
        "other": scratch_index(size),
        "the prompt's own": scratch_index(size, prompts[:1] * size.references),
    }
    functions = {"unguided": _drawing(size, models[False], Mitigation(), prompts)}
    details: dict[str, dict[str, Any]] = {}
    for way, (small, cadence) in WAYS.items():
        for share in SHARES:
            for caption, index in indexes.items():
                if share != 0.1 and caption != "other":
                    continue
                name = f"{way}, {share:.0%} active"
                if share:
                    name += f" ({caption} caption)"
                mitigation = Guided([_forced(index, share, cadence)])
                functions[name] = _drawing(size, models[small], mitigation, prompts)
                goal = small and cadence.every > 1 and share == 0.1
                searches = _searches(size, models[False], cadence)
                details[name] = {"searches": searches, "limit": LIMIT if goal else None}
    timings = interleaved(functions, size.repetitions, clock=clock())
    return [
        compared(
            f"latents, text, scale 3: {name} / unguided",
            timings,
            name,
            "unguided",
            parameters=sum(weight.numel() for weight in models[False].denoiser.parameters()),
            batch=size.batch,
            steps=size.steps,
            references=size.references,
            clock=clock().__name__,
            **detail,
        )
        for name, detail in details.items()
    ]


def _forced(index: ReferenceIndex, share: float, cadence: Cadence) -> ForcedGuidance:
    amg = ForcedGuidance(
        index,
        EmbeddingSimilarity(),
        ConstantThreshold(0.5),
        c1=0.01,
        c2=0.01,
        c3=100.0,
        max_displacement=0.5,
        final_correction=1.1,  # above any cosine: looked for as recommended, never needed
        cadence=cadence,
    )
    amg.share = share
    return amg


def _drawing(
    size: Size, model: LoadedModel, mitigation: Mitigation, prompts: list[str]
) -> Callable[[], object]:
    scheduler = sampler(model)

    def call() -> object:
        sources = generators(0, range(size.batch))
        noise = draw(model.noise_shape, sources).to(device())
        return sample_text(model, mitigation, prompts, noise, scheduler, size.steps, SCALE, sources)

    return call


def _searches(size: Size, model: LoadedModel, cadence: Cadence) -> int:
    """Steps at which the batch is decoded and compared."""
    scheduler: Any = sampler(model)
    scheduler.set_timesteps(size.steps)
    trained = scheduler.config.num_train_timesteps
    times = [float(t) / trained for t in scheduler.timesteps]
    return sum(
        step % cadence.every == 0 or time <= cadence.always_below or step == size.steps - 1
        for step, time in enumerate(times)
    )


if __name__ == "__main__":
    measure("latent_guidance", run)
