"""``memfree demo``: induce, measure and remove memorization on handwritten digits."""

from __future__ import annotations

from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt

from memfree.cli.stages import Stage, run_stages
from memfree.console import plain_console
from memfree.folders.claim import check_kind
from memfree.folders.manifest import save_config, write_manifest

SAMPLES = {"unguided": "none", "amg": "amg", "both": "both"}
"""The demo's sample folders and their mitigations."""
DENOISING_STEPS = 40
"""Fewer than the default, so that two slow cores need at most six minutes."""


def demo(
    out: Path = Path("runs/demo"),
    seed: NonNegativeInt = 7,
    duplicated: PositiveInt = 16,
    factor: PositiveInt = 64,
    steps: PositiveInt = 1200,
    count: PositiveInt = 1300,
    guidance_scale: float = 2.0,
) -> None:
    """Train on digits of which some are repeated, show that they are copied, and stop it.

    Runs the steps of README.md on scikit-learn's 1797 handwritten digits (no download): prepare,
    index, train, sample three times from the same noise (unguided; Anti-Memorization Guidance;
    multiplicity guidance and AMG), evaluate, report. Prints each command; resumes when restarted.

    Args:
        out: folder for all results.
        seed: of the split, the duplicated images, the training and the noise.
        duplicated: training images that are repeated, of 500.
        factor: copies of each of them in the training set.
        steps: optimizer steps.
        count: samples of each kind.
        guidance_scale: classifier-free guidance scale s_0.
    """
    console = plain_console()
    check_kind(out, "demo")
    stages = demo_stages(out, seed, duplicated, factor, steps, count, guidance_scale)
    seconds = run_stages(stages, console)
    save_config(out)
    write_manifest(out, "demo", seed)
    page = out / "evaluation" / "report" / "index.html"
    line = f"\nDone in {seconds / 60:.1f} minutes. Open {page} in a browser."
    console.print(line, style="bold", markup=False, emoji=False, soft_wrap=True)


def demo_stages(
    out: Path,
    seed: int,
    duplicated: int,
    factor: int,
    steps: int,
    count: int,
    guidance_scale: float,
) -> list[Stage]:
    """The demo's commands, in order."""
    data, model, index = out / "data", out / "model", out / "index"
    plan = {
        "plan.images": duplicated,
        "plan.factor": factor,
        "plan.choice": "balanced",
        "plan.seed": seed,
    }
    training = {
        "data.path": data,
        "out": model,
        "model.class_conditional": True,
        "trainer.max_steps": steps,
        "trainer.devices": 1,
        "seed": seed,
    }
    stages = [
        Stage("prepare", {"out": data, "source": "digits", "seed": seed, **plan}),
        Stage("index", {"dataset": data, "out": index}),
        Stage("train", training),
    ]
    folders = {}
    for name, mitigation in SAMPLES.items():
        folders[name] = out / "samples" / name
        options = {
            "model": model,
            "index": index,
            "out": folders[name],
            "count": count,
            "batch_size": 325,
            "steps": DENOISING_STEPS,
            "scheduler": "ddpm",
            "guidance_scale": guidance_scale,
            "mitigation": mitigation,
            "seed": seed,
            "trainer.devices": 1,
        }
        stages.append(Stage("sample", options))
    named = {f"samples.{name}": folder for name, folder in folders.items()}
    evaluation = out / "evaluation"
    stages.append(Stage("evaluate", {"dataset": data, "index": index, **named, "out": evaluation}))
    stages.append(Stage("report", {"evaluation": evaluation}))
    return stages
