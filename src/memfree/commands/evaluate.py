"""``memfree evaluate``: measure memorization and quality of sample folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jsonargparse.typing import PositiveInt
from rich.console import Console

from memfree.console import plain_console
from memfree.data.split import DEFAULT_RATE
from memfree.evaluation.inputs import DEFAULT_REFERENCE, Inputs, Subject, open_inputs
from memfree.folders.claim import claim
from memfree.guidance import WITH_AMG

TYPE_CHECKING = False  # not typing's, whose imports jsonargparse would run for --help
if TYPE_CHECKING:
    from memfree.evaluation.agreement import ClipScorer
    from memfree.evaluation.embedding import View
    from memfree.evaluation.measuring import Second
    from memfree.evaluation.metrics import Metric


def evaluate(
    dataset: Path,
    index: Path,
    samples: dict[str, Path],
    out: Path,
    false_positive_rate: float = DEFAULT_RATE,
    other_rates: tuple[float, ...] = (0.05, 0.1),
    reference: str = DEFAULT_REFERENCE,
    other_data: tuple[str, ...] = ("oracle",),
    second_embedding: Path | None = None,
    clip: Path | None = None,
    batch_size: PositiveInt = 256,
    seed: int = 0,
) -> None:
    """Measure how much samples copy, and how good they are, against held-out images.

    Writes metrics.json, per_sample.parquet, and what `memfree report` draws. The test images of
    the data set are measured as if they were samples; they are the subject `heldout`.
    `read_metrics` reads the result.

    Args:
        dataset: dataset folder that the model was trained on.
        index: reference index folder of that data set, calibrated.
        samples: sample folders by a name of your choice: --samples.unguided FOLDER
            --samples.amg FOLDER.
        out: folder to write; an earlier evaluation there is replaced when this one is complete.
        false_positive_rate: share of real images that the verdict may call copies; at least
            5 / (number of calibration images).
        other_rates: further false-positive rates to report copies at; those that are too small
            for the calibration images are left out.
        reference: the samples that others of the same noise are compared with, pair by pair.
        other_data: names of samples whose model was trained on another data set on purpose, such
            as the deduplicated one.
        second_embedding: folder of `memfree train-embedding` that is the second measure, of
            another seed than the index's; by default whitened EfficientNet, or pixels where the
            index is of an embedding.
        clip: folder of a CLIP (`memfree train-clip`, or any that open_clip loads from a folder) to
            score samples that have captions.
        batch_size: images measured at a time.
        seed: of bootstrap, subsets and cross-validation.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: a folder is unfinished or of other data, the index is not calibrated, or there
            are no held-out images.
    """
    from memfree.evaluation.agreement import ClipScorer
    from memfree.evaluation.measuring import measure_subjects, step
    from memfree.evaluation.metrics import HELDOUT, MetricTable, print_table
    from memfree.evaluation.quality import distribution_metrics
    from memfree.evaluation.writer import write_evaluation

    console = plain_console()
    claim(out, "evaluation")
    scorer = None if clip is None else ClipScorer(clip)
    with step(console, "Opening data set, index and samples"):
        inputs = open_inputs(dataset, index, samples, reference, other_data)
    if scorer is not None and not any(folder.captions for folder in inputs.samples.values()):
        raise ValueError("--clip needs samples with captions, and none have; leave it out")
    subjects, second = measure_subjects(
        inputs, false_positive_rate, batch_size, console, second_embedding
    )
    rates = (false_positive_rate, *other_rates)
    metrics = _memorization_metrics(inputs, subjects, second, rates, seed)
    with step(console, "Training the classifier of the fit images"):
        metrics += _class_metrics(inputs, subjects, second.fit_view, seed, console)
    with step(console, "Comparing distributions: Fréchet distance and KID"):
        metrics += distribution_metrics(inputs, subjects, second, seed)
    if scorer is not None:
        with step(console, "Scoring captions"):
            metrics += _alignment_metrics(inputs, scorer, seed)
    metrics += _power_metrics(inputs, second, false_positive_rate, seed)
    metrics += _cost_metrics(inputs)
    metrics += _paired_metrics(inputs, subjects)
    table = MetricTable(metrics)
    with step(console, "Writing"):
        write_evaluation(
            out, inputs, index, table, subjects, seed, false_positive_rate=false_positive_rate
        )
    print_table(table, [*inputs.samples, HELDOUT], console)
    line = f"Written to {out}; `memfree report --evaluation {out}` makes the page."
    console.print(line, soft_wrap=True)


def _memorization_metrics(
    inputs: Inputs,
    subjects: dict[str, Subject],
    second: Second,
    rates: tuple[float, ...],
    seed: int,
) -> list[Metric]:
    """Copies by both measures, distances, dose-response, and the share of duplicated images."""
    from memfree.evaluation import memorization
    from memfree.evaluation.metrics import HELDOUT
    from memfree.evaluation.neighbours import second_metric
    from memfree.guidance import NormalizedL2, calibration_of, default_similarity

    measure = default_similarity(inputs.index)
    calibration = calibration_of(inputs.index, measure)
    rate, others = rates[0], memorization.allowed_rates(rates[1:], len(calibration.sigmas))
    thresholds = {one: calibration.threshold(one) for one in dict.fromkeys([rate, *others])}
    per_factor = memorization.images_per_factor(
        inputs.index.group.cpu().numpy(), inputs.index.group_multiplicity.cpu().numpy()
    )
    heldout = subjects[HELDOUT]
    metrics: list[Metric] = []
    for name, subject in subjects.items():
        found = subject.found
        shared = subject.conditions
        metrics += memorization.copy_metrics(
            name, found, thresholds, rate, measure.name, shared, calibration.rate_limits
        )
        metrics.append(second_metric(second.similarity, name, subject.second_copy, rate, shared))
        metrics += memorization.distance_metrics(
            name, found, isinstance(measure, NormalizedL2), shared
        )
        metrics += memorization.factor_metrics(name, found, per_factor, shared)
        weights = memorization.class_weights(heldout.labels, subject.labels, len(heldout.found))
        metrics += memorization.duplicated_share_metrics(
            name, found.multiplicity > 1, heldout.found.multiplicity > 1, weights, seed, shared
        )
    return metrics


def _power_metrics(inputs: Inputs, second: Second, rate: float, seed: int) -> list[Metric]:
    """Share of known copies, training images changed on purpose, that either measure finds."""
    from memfree.evaluation.intervals import wilson
    from memfree.evaluation.memorization import CHANGED_IMAGES, changed_copies
    from memfree.evaluation.metrics import CHANGED, metric
    from memfree.evaluation.neighbours import find_neighbours, second_copies
    from memfree.guidance import calibration_of, default_similarity

    train = inputs.dataset.part("train")
    images = next(iter(train.batches(CHANGED_IMAGES)))
    measure = default_similarity(inputs.index)
    calibration = calibration_of(inputs.index, measure)
    metrics = []
    for name, changed in changed_copies(images, seed).items():
        found = find_neighbours(inputs.index, measure, calibration, changed, rate)
        sigma = second.similarity.sigma(changed, second.viewer(changed))
        for prefix, flags in (
            ("copies", found.copy),
            ("second_copies", second_copies(second.similarity, sigma, rate)),
        ):
            share = wilson(int(flags.sum()), len(flags))
            metrics.append(metric(f"{prefix}_of_{name}", CHANGED, share, len(flags)))
    return metrics


def _class_metrics(
    inputs: Inputs, subjects: dict[str, Subject], fit_view: View, seed: int, console: Console
) -> list[Metric]:
    """Class agreement of the samples that were asked for a class; sets ``agrees``."""
    from memfree.evaluation import agreement
    from memfree.evaluation.intervals import shared_conditions

    labels = inputs.dataset.part("fit").labels
    if labels is None or all(subjects[name].labels is None for name in inputs.samples):
        return []
    try:
        judge = agreement.ClassJudge.fit(fit_view.classifier_features(), labels.numpy(), seed)
    except ValueError as error:
        console.print(f"Class agreement is left out: {error}", markup=False)
        return []
    metrics = []
    for name, subject in subjects.items():
        if subject.labels is None:
            continue
        known = judge.knows(subject.labels)
        if known.any():
            features = subject.view.take(np.flatnonzero(known)).classifier_features()
            subject.agrees = judge.agrees(features, subject.labels[known])
            if subject.conditions is not None:
                subject.agrees_conditions = shared_conditions(subject.conditions[known])
            metrics.append(judge.metric(name, subject.agrees, subject.agrees_conditions))
    return metrics


def _alignment_metrics(inputs: Inputs, scorer: ClipScorer, seed: int) -> list[Metric]:
    """CLIP scores of the samples that have captions, and of the test images."""
    from memfree.evaluation.agreement import alignment_metrics
    from memfree.evaluation.metrics import HELDOUT

    folders = {name: folder for name, folder in inputs.samples.items() if folder.captions}
    paired = {
        name: reference
        for name, reference in inputs.paired.items()
        if name in folders
        and reference in folders
        and folders[name].captions == folders[reference].captions
    }
    subjects = {name: (folder.images(), folder.captions or []) for name, folder in folders.items()}
    test = inputs.dataset.part("test")
    if test.captions is not None:
        subjects[HELDOUT] = (test.images(), test.captions)
    return alignment_metrics(scorer, subjects, paired, seed)


def _cost_metrics(inputs: Inputs) -> list[Metric]:
    """Seconds and memory a sample from the sample manifests, active steps from the traces."""
    from memfree.evaluation.metrics import metric
    from memfree.evaluation.writer import active_share, trace_of

    metrics = []
    for name, folder in inputs.samples.items():
        n = len(folder)
        for manifest_name in ("seconds_per_sample", "peak_memory_bytes"):
            value = folder.manifest.get(manifest_name)
            if value is not None:
                metrics.append(
                    metric(
                        manifest_name,
                        name,
                        float(value),
                        n,
                        device=folder.manifest["made_by"].get("device"),
                        steps=folder.manifest.get("steps"),
                    )
                )
        steered = folder.manifest.get("mitigation") in WITH_AMG
        if steered and (trace := trace_of(folder)) is not None:
            metrics.append(metric("active_share", name, active_share(trace), n))
    return metrics


def _paired_metrics(inputs: Inputs, subjects: dict[str, Subject]) -> list[Metric]:
    """Differences to the reference over samples that began with the same noise."""
    from memfree.evaluation import memorization

    metrics: list[Metric] = []
    for name, reference in inputs.paired.items():
        own, other = subjects[name], subjects[reference]
        flags = {
            "copies": (own.found.copy, other.found.copy),
            "second_copies": (own.second_copy, other.second_copy),
            "duplicated_share": (own.found.multiplicity > 1, other.found.multiplicity > 1),
        }
        shared: dict[str, np.ndarray | None] = dict.fromkeys(flags, own.conditions)
        if own.agrees is not None and other.agrees is not None:
            flags["class_agreement"] = (own.agrees, other.agrees)
            shared["class_agreement"] = own.agrees_conditions
        metrics += memorization.paired_metrics(name, reference, flags, shared)
        group = inputs.index.group.cpu().numpy()
        metrics += memorization.same_image_metrics(
            name,
            reference,
            group[own.found.row],
            group[other.found.row],
            other.found.copy,
            own.labels,
            own.conditions,
        )
    return metrics
