"""``memfree evaluate``: measure memorization and quality of sample folders."""

from __future__ import annotations

from pathlib import Path

from jsonargparse.typing import PositiveInt

from memfree.console import plain_console
from memfree.data.split import DEFAULT_RATE
from memfree.folders.claim import claim


def evaluate(
    dataset: Path,
    index: Path,
    samples: dict[str, Path],
    out: Path,
    false_positive_rate: float = DEFAULT_RATE,
    other_rates: tuple[float, ...] = (0.05, 0.1),
    reference: str = "unguided",
    other_data: tuple[str, ...] = ("oracle",),
    second_embedding: Path | None = None,
    clip: Path | None = None,
    batch_size: PositiveInt = 256,
    seed: int = 0,
) -> None:
    """Measure how much samples copy, and how good they are, against held-out images.

    Writes metrics.json (see `read_metrics`), per_sample.parquet, and what `memfree report` draws.
    The dataset's test images are measured like samples, as the subject `heldout`.

    Args:
        dataset: dataset folder that the model was trained on.
        index: calibrated reference index folder of that dataset.
        samples: sample folders by name: --samples.unguided FOLDER --samples.amg FOLDER.
        out: folder to write; a complete evaluation replaces an earlier one there.
        false_positive_rate: share of real images that the verdict may call copies; at least
            5 / (number of calibration images).
        other_rates: further false-positive rates, except those too small for the calibration set.
        reference: samples that others of the same noise are compared with, pair by pair; the
            first ones where none are called unguided.
        other_data: samples whose model was trained on another dataset on purpose, such as the
            deduplicated one.
        second_embedding: folder of `memfree train-embedding` as second measure, of another seed
            than the index's; default: whitened EfficientNet, or pixels for an embedding's index.
        clip: folder of a CLIP (`memfree train-clip`, or any that open_clip loads from a folder) to
            score captioned samples.
        batch_size: images measured at a time.
        seed: for bootstrap, subsets and cross-validation.
    """
    from memfree.evaluation import memorization
    from memfree.evaluation.agreement import ClipScorer, class_metrics, clip_metrics
    from memfree.evaluation.inputs import measure_subjects, open_inputs, step
    from memfree.evaluation.metrics import HELDOUT, MetricTable, print_table
    from memfree.evaluation.quality import distribution_metrics
    from memfree.evaluation.writer import cost_metrics, write_evaluation

    console = plain_console()
    claim(out, "evaluation")
    scorer = None if clip is None else ClipScorer(clip)
    with step(console, "Opening dataset, index and samples"):
        inputs = open_inputs(dataset, index, samples, reference, other_data)
    if scorer is not None and not any(folder.captions for folder in inputs.samples.values()):
        raise ValueError("--clip needs samples with captions, and none have; leave it out")
    subjects, second = measure_subjects(
        inputs, false_positive_rate, batch_size, console, second_embedding
    )
    rates = (false_positive_rate, *other_rates)
    metrics = memorization.memorization_metrics(inputs, subjects, second, rates, seed)
    with step(console, "Training the classifier of the fit images"):
        metrics += class_metrics(inputs, subjects, second.fit_view, seed, console)
    with step(console, "Comparing distributions: Fréchet distance and KID"):
        metrics += distribution_metrics(inputs, subjects, second, seed)
    if scorer is not None:
        with step(console, "Scoring captions"):
            metrics += clip_metrics(inputs, scorer, seed)
    metrics += memorization.known_copy_metrics(inputs, second, false_positive_rate, seed)
    metrics += cost_metrics(inputs)
    metrics += memorization.comparison_metrics(inputs, subjects)
    table = MetricTable(metrics)
    with step(console, "Writing"):
        write_evaluation(out, inputs, index, table, subjects, seed, false_positive_rate)
    print_table(table, [*inputs.samples, HELDOUT], console)
    line = f"Written to {out}; `memfree report --evaluation {out}` makes the page."
    console.print(line, soft_wrap=True)
