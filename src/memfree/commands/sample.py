"""``memfree sample``: draw samples from a model, with or without a mitigation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

from memfree.cli.errors import named_option
from memfree.console import quiet, say
from memfree.folders.atomic import check_free_space
from memfree.folders.lock import ALL, one_at_a_time, part_of
from memfree.folders.manifest import folder_hash, save_config
from memfree.guidance import MITIGATIONS, WITH_AMG, WITH_INDEX, GuidanceSettings
from memfree.models.options import Devices
from memfree.sampling.sample_run import PromptOptions, SampleRun, SchedulerName, trace_summary

TYPE_CHECKING = False  # not typing's, whose imports jsonargparse would run for --help
if TYPE_CHECKING:
    from memfree.models import LoadedModel
    from memfree.retrieval import ReferenceIndex


def prompts_in_turn(prompts: PromptOptions, model: LoadedModel) -> list[str] | None:
    """The prompts to take in turn; None for a pixel model."""
    from memfree.data import DatasetFolder
    from memfree.data.prompts import prompt_set, read_prompts

    given = [option for option in (prompts.file, prompts.dataset) if option is not None]
    if model.pipe is None:
        if given:
            raise ValueError("--prompts needs a text-to-image model; this one takes no text")
        return None
    if len(given) != 1:
        raise ValueError("a text-to-image model needs either --prompts.file or --prompts.dataset")
    if prompts.file is not None:
        with named_option("--prompts.file"):
            return read_prompts(prompts.file)
    assert prompts.dataset is not None
    with named_option("--prompts.dataset"):
        data = DatasetFolder(prompts.dataset)
        return prompt_set(data, prompts.captions, int(prompts.least_records))


IDLE_RANK = "Total length of .* across ranks is zero.*"
"""A spurious warning: on resumption a rank may have nothing left to do."""


@dataclass(frozen=True)
class SamplingDevices(Devices):
    """Where sampling runs: options of the Lightning Trainer."""

    strategy: str = "auto"
    """auto or ddp: samples are divided among the devices."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Arithmetic of the network; images, similarity and its gradient stay in float32."""


def predict(
    model: Path,
    out: Path,
    index: Path | None = None,
    count: PositiveInt = 64,
    batch_size: PositiveInt = 64,
    seed: NonNegativeInt = 0,
    steps: PositiveInt = 50,
    scheduler: SchedulerName = "ddpm",
    guidance_scale: NonNegativeFloat = 1.0,
    classes: list[NonNegativeInt] | NonNegativeInt | None = None,
    prompts: PromptOptions = PromptOptions(),  # noqa: B008
    latents: Path | None = None,
    decoder: Path | None = None,
    guidance: GuidanceSettings = GuidanceSettings(),  # noqa: B008 - read only; --help shows it
    batches_per_shard: PositiveInt = 1,
    part: str = ALL,
    allow_other_dataset: bool = False,
    one_call: bool = True,
    trainer: SamplingDevices = SamplingDevices(),  # noqa: B008
) -> None:
    """Draw samples from a trained model, with or without a mitigation of memorization.

    The same command resumes a stopped run. Sample i starts from the same noise in every run of the
    same seed, so that runs differ by their guidance alone.

    Args:
        model: model folder that train.py wrote, or a Stable-Diffusion-style diffusers folder.
        out: folder for the samples; new, empty, or this very run's.
        index: reference index of the training images, required by amg, multiplicity, both and
            reject. Without one, other samples have no trace of their similarity.
        count: number of samples.
        batch_size: samples drawn together on a device.
        seed: seed of the run; sample i depends on (seed, i).
        steps: number of denoising steps.
        scheduler: sampler, with the noise schedule of the model.
        guidance_scale: classifier-free guidance; 1 is the conditional model alone.
        classes: one label, as 3, or several that are taken in turn, as [0,1]; default: all.
        prompts: the prompts of a text-to-image model.
        latents: index of the training images' latents, for multiplicity guidance of text-to-image.
        decoder: folder of an AutoencoderTiny of the model's latents, which decodes the clean
            estimates compared with the index: cheaper, but it may miss or delay detections and so
            guidance. The last step and the images use the model's own autoencoder.
        guidance: the mitigation and its strengths.
        batches_per_shard: batches per shard; a killed run repeats at most these.
        part: all, or as 3/8 the third of eight parts, for jobs that fill one folder together.
        allow_other_dataset: accept an index of other images than the model was trained on.
        one_call: classifier-free guidance in one network call, in two where memory is short;
            false: always in two, to reproduce the bits of such samples.
        trainer: devices.
    """
    from memfree.models import load_model
    from memfree.models.export import pipeline_folder
    from memfree.out_of_memory import explained_memory
    from memfree.sampling import checks
    from memfree.sampling.module import SampleIndices, SamplingModule
    from memfree.sampling.writer import SampleProgress, SampleWriter
    from memfree.training.trainer import build_trainer

    if decoder is not None and index is None:
        raise ValueError("--decoder needs --index: without one, no estimate is compared")
    loaded = load_model(model, decoder)
    checks.refuse_text_only(guidance, loaded)
    asked: list[int] | list[str] | None = prompts_in_turn(prompts, loaded)
    if asked is None:
        asked = checks.labels_in_turn(classes, loaded, guidance_scale)
    elif classes is not None:
        raise ValueError("--classes is for models of classes; a text-to-image model has --prompts")
    reference = (
        None if index is None else checks.index_for(index, loaded, guidance, allow_other_dataset)
    )
    guidance = guidance.resolved(reference)
    if reference is None and guidance.mitigation in WITH_INDEX:
        raise ValueError(f"--mitigation {guidance.mitigation} needs --index")
    if index is not None and reference is not None:
        checks.refuse_without_captions(index, reference, loaded, guidance, guidance_scale)
    checks.refuse_wrong_settings(guidance, loaded, reference)
    references = checks.latents_for(latents, loaded, guidance)
    sampler = checks.scheduler_for(scheduler, loaded, steps)
    # Without text and index only a user's mitigation has anything to do or record.
    unguided = reference is None and loaded.pipe is None and guidance.mitigation in MITIGATIONS

    run = SampleRun(
        out,
        {
            "model_sha256": folder_hash(pipeline_folder(model)),
            **checks.index_state(reference),
            "seed": seed,
            "steps": steps,
            "scheduler": scheduler,
            "guidance_scale": guidance_scale,
            "asked": asked,
            "latents_sha256": None if references is None else checks.vectors_hash(references),
            "decoder_sha256": None if decoder is None else folder_hash(decoder),
            "guidance": asdict(guidance),
            "trainer.precision": trainer.precision,
        },
        count,
        part_of(part),
    )
    run.check()
    if run.finished:
        run.verify()
        say(f"{out} is finished: {count} samples")
        return
    writer = SampleWriter(
        run,
        seed,
        guidance.mitigation,
        None if reference is None else reference.keys,
        batches_per_shard,
    )
    with quiet(IDLE_RANK):
        lightning = build_trainer(
            **asdict(trainer),
            inference_mode=False,  # guidance takes gradients
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[writer, SampleProgress(guidance.mitigation in WITH_AMG)],
        )
    with run:
        # Incompressible PNGs, tar headers and JSON, rows of the trace.
        each = prod(loaded.image_shape) + 2560 + (0 if reference is None else 60 * steps)
        check_free_space(out, count * each)
        save_config(out)

        ways = [f"a smaller --batch_size (now {batch_size})"] if batch_size > 1 else []
        if trainer.precision == "32-true":
            ways.append("--trainer.precision bf16-mixed (in another --out, if samples are there)")
        with quiet(IDLE_RANK), explained_memory("sampling", ways):
            lightning.predict(
                SamplingModule(
                    loaded,
                    sampler,
                    steps,
                    seed,
                    guidance=() if unguided else guidance,
                    guidance_scale=guidance_scale,
                    asked=asked,
                    index=reference,
                    latents=references,
                    one_call=one_call,
                ),
                datamodule=SampleIndices(run, batch_size),
                return_predictions=False,
            )
            lightning.strategy.barrier("all samples are written")
        if lightning.is_global_zero:
            with one_at_a_time(out, run.part):
                if run.part.whole or not (missing := run.missing()):
                    _finish(run, seed, model, index, loaded, reference)
                else:
                    say(f"{out}: part {part} is drawn; {len(missing)} samples of others are not")


def _finish(
    run: SampleRun,
    seed: int,
    model: Path,
    index: Path | None,
    loaded: LoadedModel,
    reference: ReferenceIndex | None,
) -> None:
    """Write the manifest: what the samples depend on, and what they cost over all runs."""
    import pyarrow.compute as pc

    from memfree.sampling.sample_folder import read_records

    records = read_records(run.shards())
    seconds = pc.sum(records["seconds"]).as_py()
    settings = run.settings
    summary = None
    if reference is not None:
        pairs = zip(records["index"].to_pylist(), records["condition"].to_pylist(), strict=True)
        asked, known = settings["asked"], reference.captions
        if not asked or not isinstance(asked[0], str):
            known = None if reference.labels is None else reference.labels.tolist()
        of_key = None if known is None else dict(zip(reference.keys, known, strict=True))
        summary = trace_summary(sorted(run.folder.glob("trace-*.parquet")), dict(pairs), of_key)
    same = ("steps", "scheduler", "guidance_scale", "asked", "guidance")
    run.finish(
        seed,
        mitigation=settings["guidance"]["mitigation"],
        image_shape=list(loaded.image_shape),
        **{name: settings[name] for name in same},
        model=str(model),
        index=None if index is None else str(index),
        dataset_hash=loaded.manifest.get("dataset_hash"),
        index_features=None if reference is None else reference.features.describe()["name"],
        index_dataset_hash=None if reference is None else reference.dataset_hash,
        seconds=seconds,
        seconds_per_sample=seconds / run.count,
        peak_memory_bytes=pc.max(records["peak_memory_bytes"]).as_py(),
        trace_summary=summary,
    )
    line = f"{run.folder}: {run.count} samples, {seconds / run.count:.3f} s each"
    if summary is not None and settings["guidance"]["mitigation"] in WITH_AMG:
        line += f"; AMG acted on {summary['active_samples']:.1%} of them"
    say(line)
