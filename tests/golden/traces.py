# ruff: noqa: E402 - threads and paths come before imports
"""What guidance makes of fixed steps and of calls of tiny pipelines, as arrays by name.

``python tests/golden/traces.py`` writes traces.npz anew. That is right only where bits are meant to
change.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # bits depend on the number of threads

import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
FILE = HERE / "traces.npz"
for folder in ("", "guidance"):
    sys.path.append(str(HERE.parent / folder))

import amg_steps
import guard_parts
import tiny_pipelines

import memfree
from memfree.guidance import (
    AntiMemorizationGuidance,
    GuidanceSettings,
    NormalizedL2,
    ThresholdSchedule,
    calibrate,
)
from memfree.retrieval import ReferenceIndex

MITIGATIONS = ("amg", "multiplicity", "both")
FAMILIES = ("stable_diffusion", "stable_diffusion_xl", "pixart", "stable_diffusion_3")
ROWS = [0, 7, -1, 3, 3, 79]


def guidances():
    """Every guidance on steps near images of an index, in the middle and at the end."""
    images = amg_steps.make_images()
    counts = torch.ones(80, dtype=torch.int64)
    counts[:8] = 16
    labels = torch.arange(80) % 5
    index = ReferenceIndex.build(images, labels=labels, counts=counts, groups=range(80))
    generator = torch.Generator().manual_seed(7)
    calibrate(index, NormalizedL2(), torch.rand(500, 1, 4, 4, generator=generator) * 2 - 1)
    paper = AntiMemorizationGuidance(index, NormalizedL2(), ThresholdSchedule(-1.95, -0.5), 1, 2, 9)
    for kind in ("epsilon", "v_prediction"):
        for last in (False, True):
            where = f"{kind}/{'last' if last else 'step'}"
            made = {"paper": [paper]} | {
                name: GuidanceSettings(name).build(index)
                for name in ("amg", "multiplicity", "both")
            }
            for name, parts in made.items():
                _, prediction = amg_steps.prediction_near(images, ROWS, kind, last=last)
                for part in parts:
                    prediction = part(prediction)
                yield f"guidance/{name}/{where}", prediction.output


def guards():
    """Images of tiny pipelines that draw pictures of their own index, by guidance."""
    for family in FAMILIES:
        pipe = getattr(tiny_pipelines, family)()

        def draw(pipe=pipe, family=family):
            call = guard_parts.options(family)
            return torch.as_tensor(pipe(guard_parts.PROMPTS, **call).images)

        unguarded = draw()
        yield f"guard/{family}/none", unguarded
        index = guard_parts.make_index(2 * unguarded.float() - 1)
        names = MITIGATIONS if family == "stable_diffusion" else ("amg",)
        for name in names:
            latents = None if name == "amg" else guard_parts.make_latents()
            settings = GuidanceSettings(name)
            with memfree.guard(pipe, index, settings, latents=latents, seed=0) as report:
                yield f"guard/{family}/{name}", draw()
            sigmas = [verdict.similarity for verdict in report.verdicts]
            yield f"guard/{family}/{name}/sigma", torch.tensor(sigmas)


def traces():
    return {name: trace.detach().numpy() for make in (guidances, guards) for name, trace in make()}


if __name__ == "__main__":
    np.savez_compressed(FILE, **traces())
