"""``memfree tune``: find the smallest guidance strengths that leave no copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml
from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.table import Table

from memfree.commands.sample import prompts_in_turn
from memfree.console import plain_console
from memfree.folders.atomic import put_in_place, unfinished, write_json, write_text
from memfree.folders.claim import claim
from memfree.folders.manifest import save_config, write_manifest
from memfree.guidance import WITH_AMG, GuidanceSettings
from memfree.guidance.options import record_paths
from memfree.sampling.sample_run import PromptOptions, SchedulerName

TYPE_CHECKING = False  # not typing's, whose imports jsonargparse would run for --help
if TYPE_CHECKING:
    from torch import Tensor

    from memfree.retrieval import ReferenceIndex
    from memfree.sampling import SamplingModule


@dataclass(frozen=True)
class Trial:
    """One strength on the trial batch."""

    scale: float
    """Multiplies c_1, c_2 and c_3."""
    copies: float
    """Share of samples above the calibrated threshold."""
    duplicated_share: float
    """Share whose nearest image is repeated in the training set."""
    active: float
    """Share of samples guided at some step."""
    displacement: float
    """Root mean square difference to the unguided sample of the same noise, images in [−1, 1]."""


def tune(
    model: Path,
    index: Path,
    out: Path,
    count: PositiveInt = 256,
    batch_size: PositiveInt = 256,
    seed: NonNegativeInt = 1_000_000,
    steps: PositiveInt = 50,
    scheduler: SchedulerName = "ddpm",
    guidance_scale: float = 1.0,
    prompts: PromptOptions = PromptOptions(),  # noqa: B008 - read only; --help shows it
    latents: Path | None = None,
    scales: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0),
    guidance: GuidanceSettings = GuidanceSettings("amg"),  # noqa: B008 - read only
    allow_other_dataset: bool = False,
) -> None:
    """Find the smallest guidance strengths that leave no copy on a trial batch.

    Multiplies c_1, c_2 and c_3 by each scale, from the smallest up, draws without the last
    correction, and stops at the first scale without a copy by the calibrated threshold. Tune on
    other noise and, where you can, another model and duplicated images than you report.

    Args:
        model: model folder that train.py wrote.
        index: calibrated reference index.
        out: folder for tune.json, and guidance.yaml for `sample.py --config`; new, empty, or of
            an earlier tuning, which is replaced.
        count: samples of the trial batch.
        batch_size: samples drawn together.
        seed: of the trial batch; keep it apart from the seeds that you report.
        steps: denoising steps.
        scheduler: sampler.
        guidance_scale: classifier-free guidance scale.
        prompts: prompts of a text-to-image model; take those whose images it copies.
        latents: index of the training images' latents, for both of text-to-image.
        scales: multiples of the strengths, tried from the smallest up.
        guidance: mitigation amg or both, the strengths to multiply, and everything else.
        allow_other_dataset: accept an index of other images than the model was trained on.
    """
    import torch

    from memfree.models import load_model
    from memfree.sampling import SamplingModule, checks

    if guidance.mitigation not in WITH_AMG:
        raise ValueError(
            f"--mitigation {guidance.mitigation}: only amg and both have strengths to tune"
        )
    if not scales or min(scales) <= 0:
        raise ValueError("--scales needs at least one number, all above 0")
    claim(out, "tuning")
    loaded = load_model(model)
    asked: list[int] | list[str] | None = prompts_in_turn(prompts, loaded)
    if asked is None:
        asked = checks.labels_in_turn(None, loaded, guidance_scale)
    reference = checks.index_for(index, loaded, guidance, allow_other_dataset)
    checks.refuse_without_captions(index, reference, loaded, guidance, guidance_scale)
    guidance = guidance.resolved(reference)
    checks.refuse_wrong_settings(guidance, loaded, reference)
    reference.to("cuda" if torch.cuda.is_available() else "cpu")
    sampler = checks.scheduler_for(scheduler, loaded, steps)
    references = checks.latents_for(latents, loaded, guidance)

    def draw(settings: GuidanceSettings) -> Drawn:
        given = loaded, sampler, steps, seed, settings, guidance_scale, asked
        module = SamplingModule(*given, index=reference, latents=references)
        return _draw(module.to(reference.device), torch.arange(count).split(batch_size))

    console = plain_console()
    with console.status("drawing unguided samples"):
        unguided = draw(replace(guidance, mitigation="none"))
    threshold = guidance.end_threshold(reference)
    trials = [_judge(0.0, unguided, unguided, reference, threshold)]
    if trials[0].copies == 0:
        raise ValueError(
            f"unguided sampling leaves no copy among {count}: there is nothing to tune; "
            "raise --count, or use the recommended strengths, which are the defaults of sample.py"
        )
    chosen: GuidanceSettings | None = None
    for scale in sorted(scales):
        strengths = {name: getattr(guidance, name) * scale for name in ("c1", "c2", "c3")}
        settings = replace(guidance, **strengths)
        with console.status(f"drawing samples with strengths × {scale:g}"):
            drawn = draw(replace(settings, final_correction=False))
        trials.append(_judge(scale, drawn, unguided, reference, threshold))
        if trials[-1].copies == 0:
            chosen = settings
            break
    console.print(table(trials))
    tuned = None
    if chosen is not None:
        # Options of amg and both are named like their fields.
        own = {name: getattr(chosen, name) for name in record_paths(chosen.mitigation)}
        tuned = {
            "steps": int(steps),
            "scheduler": scheduler,
            "guidance_scale": float(guidance_scale),
            "mitigation": {"name": chosen.mitigation, **own},
        }
    with unfinished(out) as partial:  # replaces an earlier tuning, even if this one found nothing
        write_json(partial / "tune.json", [asdict(trial) for trial in trials])
        save_config(partial)
        if tuned is not None:
            write_text(partial / "guidance.yaml", yaml.safe_dump(tuned, sort_keys=False))
        write_manifest(
            partial,
            "tuning",
            seed,
            scale=None if tuned is None else trials[-1].scale,
            model=str(model),
            index=str(index),
            count=count,
        )
        put_in_place(partial, out, overwrite=True)
    if tuned is None:
        raise ValueError(
            f"copies remain at every scale; raise --scales, --mitigation.gate_margin or "
            f"--mitigation.max_displacement ({out / 'tune.json'} has the numbers)"
        )
    line = f"Use it: python sample.py --config {out / 'guidance.yaml'} …"
    console.print(line, soft_wrap=True)


Drawn = tuple["Tensor", "Tensor"]
"""Samples (N, C, H, W) as they would be saved, and which were ever active (N,)."""


def _draw(module: SamplingModule, batches: Sequence[Tensor]) -> Drawn:
    import torch

    from memfree.images import from_bytes, to_bytes

    module.on_predict_start()
    images, active = [], []
    for indices in batches:
        drawn = module.predict_step(indices)
        assert drawn.trace is not None
        images.append(from_bytes(to_bytes(drawn.images)))
        active.append(drawn.trace["active"].reshape(-1, len(indices)).any(dim=0))
    return torch.cat(images), torch.cat(active)


def _judge(
    scale: float, drawn: Drawn, unguided: Drawn, index: ReferenceIndex, threshold: float
) -> Trial:
    """Measure a batch by the index's own similarity."""
    from memfree.guidance import default_similarity

    images, active = drawn
    match = default_similarity(index)(index, images.to(index.device))
    repeated = index.group_multiplicity.to(match.rows.device)[match.rows[:, 0]] > 1
    return Trial(
        scale=scale,
        copies=float((match.sigma > threshold).float().mean()),
        duplicated_share=float(repeated.float().mean()),
        active=float(active.float().mean()),
        displacement=math.sqrt(float((images - unguided[0]).square().mean())),
    )


def table(trials: list[Trial]) -> Table:
    """The trials, to print; the first row is unguided."""
    rows = Table(title="Strengths tried on the trial batch", title_justify="left")
    for column in ("strengths ×", "copies", "nearest is repeated", "ever active", "rms moved"):
        rows.add_column(column, justify="right")
    for trial in trials:
        rows.add_row(
            f"{trial.scale:g}" if trial.scale else "unguided",
            f"{100 * trial.copies:.1f} %",
            f"{100 * trial.duplicated_share:.1f} %",
            f"{100 * trial.active:.1f} %",
            f"{trial.displacement:.3f}",
        )
    return rows
