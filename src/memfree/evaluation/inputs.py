"""What an evaluation reads, and every image measured once: neighbours, embeddings, verdicts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from memfree.data import DatasetFolder
from memfree.evaluation.embedding import View, Viewer
from memfree.evaluation.folder import DATASET, INDEX, SAMPLES
from memfree.evaluation.intervals import shared_conditions
from memfree.evaluation.metrics import CHANGED, HELDOUT
from memfree.evaluation.neighbours import (
    IndexSimilarity,
    Neighbours,
    SecondSimilarity,
    WhitenedSimilarity,
    find_neighbours,
    second_copies,
)
from memfree.folders.manifest import read_manifest
from memfree.folders.untrusted import check_fields, short
from memfree.guidance import Calibration, Similarity, calibration_of, default_similarity
from memfree.retrieval import ReferenceIndex
from memfree.retrieval.features.base import identity
from memfree.retrieval.features.copy_detection import CopyDetectionFeatures
from memfree.sampling.sample_folder import SampleFolder

DEFAULT_REFERENCE = "unguided"
"""Samples that others are compared with; where there are none of this name, the first."""
HELD_OUT_PARTS: tuple[Literal["calibration", "test", "fit"], ...] = ("calibration", "test", "fit")
"""Thresholds, rates of real images, and the classifier: three purposes, three disjoint parts."""


@dataclass
class Subject:
    """A sample folder, or the test images, with the measurements of each of the n images."""

    name: str
    found: Neighbours
    view: View
    labels: np.ndarray | None  # (n,) requested classes; of test images, their own
    second_sigma: np.ndarray  # (n,) the second similarity
    second_copy: np.ndarray  # (n,) bool: its verdict
    conditions: np.ndarray | None = None
    """(n,) of ``shared_conditions``: number of a sample's caption, where several share one; None
    for independent images, as test images are, and samples of classes."""
    captions: list[str] | None = None
    agrees: np.ndarray | None = None
    """(≤ n,) bool: the classifier sees the requested class; without the samples of classes that it
    does not know."""
    agrees_conditions: np.ndarray | None = None  # of ``shared_conditions``, of these samples


@dataclass(frozen=True)
class Inputs:
    """A dataset, its index, and the sample folders to judge, all of the same data."""

    dataset: DatasetFolder
    index: ReferenceIndex
    samples: dict[str, SampleFolder]
    paired: dict[str, str]
    """Subject to the reference that started from the same noise under the same conditions."""
    reference: str
    """The subject that the others are compared with."""

    @cached_property
    def similarity(self) -> Similarity:
        """The first measure: the index's default."""
        return default_similarity(self.index)

    @cached_property
    def calibration(self) -> Calibration:
        """Its calibration; ValueError where the index has none."""
        return calibration_of(self.index, self.similarity)

    def neighbours(self, images: Tensor, rate: float, batch_size: int = 256) -> Neighbours:
        """Judge images (n, C, H, W) by the first measure at a false-positive rate."""
        return find_neighbours(
            self.index, self.similarity, self.calibration, images, rate, batch_size
        )


def open_index(index: Path, dataset: Path | None) -> tuple[ReferenceIndex, DatasetFolder | None]:
    """Open an index, and the dataset that it must have been built from."""
    data = None if dataset is None else DatasetFolder(dataset)
    references = ReferenceIndex.load(index)
    if data is not None and references.dataset_hash not in (None, data.hash):
        raise ValueError(
            f"--index {index} was built from a different dataset than --dataset {dataset}; "
            "build it with `memfree index` from this one"
        )
    return references, data


def open_inputs(
    dataset: Path,
    index: Path,
    samples: dict[str, Path],
    reference: str,
    other_data: tuple[str, ...],
) -> Inputs:
    """Open everything and check that it belongs together.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: there are no samples, a held-out part is empty, index or samples are of
            another dataset or image shape, or samples were steered by other features.
    """
    if not samples:
        raise ValueError("no samples to evaluate: give at least one --samples.NAME FOLDER")
    if taken := {HELDOUT, CHANGED} & samples.keys():
        raise ValueError(f"--samples.{min(taken)}: this name is taken; choose another")
    if reference not in samples:
        if reference != DEFAULT_REFERENCE:
            raise ValueError(f"--reference {reference} is not one of {', '.join(samples)}")
        reference = next(iter(samples))
    references, data = open_index(index, dataset)
    assert data is not None
    for part in HELD_OUT_PARTS:
        data.part(part)  # refuses an empty one
    check_fields(data.manifest, DATASET, f"{dataset}/manifest.json")
    check_fields(read_manifest(index, "index"), INDEX, f"{index}/manifest.json")
    folders = {name: SampleFolder(path) for name, path in samples.items()}
    for name, folder in folders.items():
        check_fields(folder.manifest, SAMPLES, f"{folder.path}/manifest.json")
        if problem := _problem_with(folder, data, references, other_data=name in other_data):
            raise ValueError(f"--samples.{name} {folder.path} {problem}")
    paired = {
        name: reference
        for name, folder in folders.items()
        if name != reference and _same_noise(folder, folders[reference])
    }
    return Inputs(data, references, folders, paired, reference)


def _problem_with(
    folder: SampleFolder, data: DatasetFolder, index: ReferenceIndex, other_data: bool
) -> str:
    """Why samples cannot be judged by this dataset and index; empty if they can."""
    if len(folder) == 0:
        return "holds no samples"
    shape, wanted = tuple(folder.image_shape), tuple(data.image_shape)
    if shape != wanted:
        return f"has images of shape {shape}, the dataset has {wanted}"
    if not other_data and folder.manifest.get("dataset_hash") not in (None, data.hash):
        return (
            f"is from a model of a different dataset than --dataset {data.path}; name it in "
            "--other_data if that is what you want to compare"
        )
    own = index.features.describe()["name"]
    steered_by = folder.manifest.get("index_features")
    if folder.manifest.get("mitigation") != "none" and steered_by not in (None, own):
        return (
            f"was steered by an index of {short(steered_by, 40)}, --index is of {own}: the second "
            "measure would be what steered; give the index that steered"
        )
    return ""


def _same_noise(first: SampleFolder, second: SampleFolder) -> bool:
    """Whether sample i of both began with the same noise and the same condition.

    Rejected samples were drawn again from other noise.
    """
    if "reject" in (first.manifest.get("mitigation"), second.manifest.get("mitigation")):
        return False
    if len(first) != len(second) or not torch.equal(first.seeds, second.seeds):
        return False
    if first.captions != second.captions:
        return False
    if first.conditions is None or second.conditions is None:
        return first.conditions is second.conditions
    return torch.equal(first.conditions, second.conditions)


@dataclass
class Second:
    """The second similarity, and the views that it was made from."""

    similarity: SecondSimilarity
    viewer: Viewer
    fit_view: View
    train_view: View

    def judge(self, images: Tensor, view: View, rate: float) -> tuple[np.ndarray, np.ndarray]:
        """Similarity (n,) and verdict (n,) bool of images at a false-positive rate."""
        sigma = self.similarity.sigma(images, view)
        return sigma, second_copies(self.similarity, sigma, rate)


def measure_subjects(
    inputs: Inputs,
    rate: float,
    batch_size: int,
    console: Console,
    second_embedding: Path | None = None,
) -> tuple[dict[str, Subject], Second]:
    """Neighbours, views and both verdicts of every sample folder and of the test images."""
    inputs.calibration.threshold(rate)  # refuses a rate that is too small before the work
    with step(console, "Embedding the dataset"):
        second = _second_similarity(inputs, batch_size, second_embedding)
    second.similarity.calibration.threshold(rate)
    test = inputs.dataset.part("test")
    sources = {
        name: (folder.images, folder.conditions, folder.captions)
        for name, folder in inputs.samples.items()
    }
    sources[HELDOUT] = (test.images, test.labels, None)
    subjects = {}
    for name, (load, labels, captions) in sources.items():
        with step(console, f"Measuring {name}"):
            images = load()
            found = inputs.neighbours(images, rate, batch_size)
            view = second.viewer(images)
            subjects[name] = Subject(
                name,
                found,
                view,
                None if labels is None else labels.numpy(),
                *second.judge(images, view, rate),
                # Captions are a sample of possible ones; classes are strata, all drawn from.
                conditions=shared_conditions(captions),
                captions=captions,
            )
    return subjects, second


def _second_similarity(inputs: Inputs, batch_size: int, embedding: Path | None) -> Second:
    """Embed the dataset; the second measure is of embeddings unless the first one is."""
    data = inputs.dataset
    features = None if embedding is None else CopyDetectionFeatures.load(embedding)
    if features and identity(features.describe()) == identity(inputs.index.features.describe()):
        raise ValueError(
            f"--second_embedding {embedding} is the embedding of --index: nothing would be "
            "judged by another measure; train one with another --seed"
        )
    fit_images, calibration = data.part("fit").images(), data.part("calibration")
    viewer = Viewer(fit_images, batch_size)
    fit_view = viewer(fit_images)
    train_view = viewer(data.part("train").batches(batch_size))
    second: SecondSimilarity
    if features is None and inputs.index.metric == "l2":
        extractor = viewer.describe_pooled()["extractor"]
        calibration_view = viewer(calibration.batches(batch_size))
        second = WhitenedSimilarity(fit_view, train_view, calibration_view, extractor)
    else:
        other = ReferenceIndex.build(data, features)
        second = IndexSimilarity(other, calibration.images())
    return Second(second, viewer, fit_view, train_view)


@contextmanager
def step(console: Console, what: str) -> Iterator[None]:
    """Say what is going on: a spinner on a terminal, nothing where output is a file."""
    with console.status(Text(f"{what} …")):
        yield
