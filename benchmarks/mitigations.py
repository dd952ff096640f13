"""Seconds a sample of every mitigation, with the models of the studies' first training seed.

``python benchmarks/mitigations.py`` needs the models that ``memfree study --config
configs/study/oracle.yaml`` leaves in runs/study, and writes benchmarks/results/mitigations.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from harness import compared, interleaved, write

from memfree.guidance import GuidanceSettings
from memfree.guidance.settings import Mitigation
from memfree.models import load_model
from memfree.retrieval import ReferenceIndex
from memfree.sampling import SamplingModule
from memfree.sampling.schedulers import build_scheduler

STUDY = Path("runs/study")
CELLS = [f"unconditional-x{factor}-seed1" for factor in (1, 4, 16, 64, 256)] + ["class-x64-seed1"]
COUNT, STEPS, SEED = 100, 50, 1001
"""Samples a call, all in one batch; denoising steps; the studies' noise of that training seed."""


def run(repetitions: int = 5) -> list[dict[str, Any]]:
    """Measure; one record a model and mitigation (see ``harness.record``), in seconds a sample."""
    return [entry for cell in CELLS for entry in _cell(STUDY / cell, repetitions)]


def _cell(folder: Path, repetitions: int) -> list[dict[str, Any]]:
    mitigations = get_args(Mitigation)
    timings = interleaved({name: _sampler(folder, name) for name in mitigations}, repetitions)
    for timing in timings.values():
        timing.seconds = [seconds / COUNT for seconds in timing.seconds]
    return [
        compared(
            f"{folder.name}: {name} / unguided, a sample",
            timings,
            name,
            "none",
            samples=COUNT,
            steps=STEPS,
        )
        for name in mitigations
        if name != "none"
    ]


def _sampler(folder: Path, mitigation: Mitigation) -> Callable[[], object]:
    model, index = load_model(folder / "model"), ReferenceIndex.load(folder / "index")
    classes = None if model.num_classes is None else list(range(model.num_classes))
    module = SamplingModule(
        model,
        build_scheduler("ddpm", model.scheduler),
        STEPS,
        SEED,
        guidance=() if mitigation == "none" else GuidanceSettings(mitigation=mitigation),
        guidance_scale=1.0 if classes is None else 2.0,
        asked=classes,
        index=index,
    ).to("cuda" if torch.cuda.is_available() else "cpu")
    module.on_predict_start()
    return lambda: module.predict_step(torch.arange(COUNT))


if __name__ == "__main__":
    if not all((STUDY / cell / "model").is_dir() for cell in CELLS):
        sys.exit(f"{STUDY} lacks models: run memfree study --config configs/study/oracle.yaml")
    write("mitigations", run())
