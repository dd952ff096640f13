"""Measure every image once: neighbours, embeddings, verdicts of both similarities."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from memfree.evaluation.embedding import View, Viewer
from memfree.evaluation.inputs import Inputs, Subject, labels_of
from memfree.evaluation.intervals import shared_conditions
from memfree.evaluation.metrics import HELDOUT
from memfree.evaluation.neighbours import (
    IndexSimilarity,
    SecondSimilarity,
    WhitenedSimilarity,
    find_neighbours,
    second_copies,
)
from memfree.guidance import calibration_of, default_similarity
from memfree.retrieval import ReferenceIndex
from memfree.retrieval.features.base import identity
from memfree.retrieval.features.copy_detection import CopyDetectionFeatures


@dataclass
class Second:
    """The second similarity, and the views that it was made from."""

    similarity: SecondSimilarity
    viewer: Viewer
    fit_view: View
    train_view: View


def measure_subjects(
    inputs: Inputs,
    rate: float,
    batch_size: int,
    console: Console,
    second_embedding: Path | None = None,
) -> tuple[dict[str, Subject], Second]:
    """Neighbours, views and both verdicts of every sample folder and of the test images."""
    measure = default_similarity(inputs.index)
    calibration = calibration_of(inputs.index, measure)
    calibration.threshold(rate)  # refuses a rate that is too small before anything is computed
    with step(console, "Embedding the data set"):
        second = _second_similarity(inputs, batch_size, second_embedding)
    second.similarity.calibration.threshold(rate)
    test = inputs.dataset.part("test")
    test_labels = None if test.labels is None else test.labels.numpy()
    sources = {
        name: (folder.images, labels_of(folder), folder.captions)
        for name, folder in inputs.samples.items()
    }
    sources[HELDOUT] = (test.images, test_labels, None)
    subjects = {}
    for name, (load, labels, captions) in sources.items():
        with step(console, f"Measuring {name}"):
            images = load()
            found = find_neighbours(inputs.index, measure, calibration, images, rate, batch_size)
            view = second.viewer(images)
            sigma = second.similarity.sigma(images, view)
            copies = second_copies(second.similarity, sigma, rate)
            # Captions are a sample of what could be asked for; classes are strata, all drawn from.
            shared = shared_conditions(captions)
            subjects[name] = Subject(
                name, found, view, labels, sigma, copies, conditions=shared, captions=captions
            )
    return subjects, second


def _second_similarity(inputs: Inputs, batch_size: int, embedding: Path | None) -> Second:
    """Embed the data set; the second measure is of embeddings unless the first one is.

    Raises:
        ValueError: the second embedding is the first measure's.
    """
    data = inputs.dataset
    features = None if embedding is None else CopyDetectionFeatures.load(embedding)
    if features and identity(features.describe()) == identity(inputs.index.features.describe()):
        raise ValueError(
            f"--second_embedding {embedding} is the embedding of --index: nothing would be "
            "judged by another measure; train one with another --seed"
        )
    fit_images = data.part("fit").images()
    viewer = Viewer(fit_images, batch_size)
    fit_view = viewer(fit_images)
    train_view = viewer(data.part("train").batches(batch_size))
    second: SecondSimilarity
    if features is not None:
        other = ReferenceIndex.build(data, features)
        second = IndexSimilarity(other, data.part("calibration").images())
    elif inputs.index.metric == "l2":
        calibration = viewer(data.part("calibration").batches(batch_size))
        extractor = viewer.describe_pooled()["extractor"]
        second = WhitenedSimilarity(fit_view, train_view, calibration, extractor)
    else:
        second = IndexSimilarity(ReferenceIndex.build(data), data.part("calibration").images())
    return Second(second, viewer, fit_view, train_view)


@contextmanager
def step(console: Console, what: str) -> Iterator[None]:
    """Say what is going on: a spinner on a terminal, nothing where output is a file."""
    with console.status(Text(f"{what} …")):
        yield
