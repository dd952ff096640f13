"""Seconds a sample of every mitigation of pixels, with the models of the studies' first seed.

``python benchmarks/mitigations.py`` needs the models that `memfree study configs/study/oracle.yaml`
leaves in runs/study, and writes benchmarks/results/mitigations.json. With ``--tiny`` the models are
made on the spot, of random weights.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import Records, compared, interleaved, measure

from memfree.guidance import (
    MITIGATIONS,
    TEXT_ONLY,
    GuidanceSettings,
    calibrate,
    default_similarity,
)
from memfree.models import DDPMModule, ModelOptions, export_model, load_model
from memfree.models.ddpm import NetworkOptions
from memfree.retrieval import ReferenceIndex
from memfree.sampling import SamplingModule
from memfree.sampling.checks import build_scheduler

STUDY = Path("runs/study")
CELLS = [f"unconditional-x{factor}-seed1" for factor in (1, 4, 16, 64, 256)] + ["class-x64-seed1"]
WITHOUT_TEXT = [name for name in MITIGATIONS if name not in TEXT_ONLY]
SEED = 1001
"""The studies' noise of their first training seed."""


class Size(NamedTuple):
    """How much is measured."""

    count: int
    """Samples of a call, all in one batch."""
    steps: int
    """Denoising steps."""
    repetitions: int


FULL, TINY = Size(100, 50, 5), Size(2, 3, 2)


def run(tiny: bool = False) -> Records:
    """Measure; one record a model and mitigation (see ``harness.record``), in seconds a sample."""
    if tiny:
        with tempfile.TemporaryDirectory() as folder:
            return _study(random_study(Path(folder)), TINY)
    cells = [STUDY / cell for cell in CELLS]
    if not all((cell / "model").is_dir() for cell in cells):
        sys.exit(f"{STUDY} lacks models: run memfree study configs/study/oracle.yaml")
    return _study(cells, FULL)


def random_study(folder: Path) -> list[Path]:
    """An unconditional and a class-conditional cell of random weights, as a study leaves them."""
    network = NetworkOptions(block_out_channels=[8, 8], attention=[False, True], norm_num_groups=4)
    images = torch.rand(580, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name, classes in (("unconditional", None), ("class", 2)):
        options = ModelOptions(network=network, class_conditional=classes is not None)
        module = DDPMModule(options, (1, 8, 8), classes)
        facts = module.facts()
        export_model(
            folder / name / "model", module.pipeline(), SEED, image_shape=[1, 8, 8], **facts
        )
        index = ReferenceIndex.build(images[:80], labels=torch.arange(80) % 2)
        calibrate(index, default_similarity(index), images[80:])
        index.save(folder / name / "index")
    return [folder / "unconditional", folder / "class"]


def _study(cells: list[Path], size: Size) -> Records:
    return [entry for cell in cells for entry in _cell(cell, size)]


def _cell(folder: Path, size: Size) -> Records:
    timings = interleaved(
        {name: _sampler(folder, name, size) for name in WITHOUT_TEXT}, size.repetitions
    )
    for timing in timings.values():
        timing.seconds = [seconds / size.count for seconds in timing.seconds]
    return [
        compared(
            f"{folder.name}: {name} / unguided, a sample",
            timings,
            name,
            "none",
            samples=size.count,
            steps=size.steps,
        )
        for name in WITHOUT_TEXT
        if name != "none"
    ]


def _sampler(folder: Path, mitigation: str, size: Size) -> Callable[[], object]:
    model, index = load_model(folder / "model"), ReferenceIndex.load(folder / "index")
    classes = None if model.num_classes is None else list(range(model.num_classes))
    module: Any = SamplingModule(
        model,
        build_scheduler("ddpm", model.scheduler),
        size.steps,
        SEED,
        guidance=() if mitigation == "none" else GuidanceSettings(mitigation=mitigation),
        guidance_scale=1.0 if classes is None else 2.0,
        asked=classes,
        index=index,
    ).to("cuda" if torch.cuda.is_available() else "cpu")
    module.on_predict_start()
    return lambda: module.predict_step(torch.arange(size.count))


if __name__ == "__main__":
    measure("mitigations", run)
