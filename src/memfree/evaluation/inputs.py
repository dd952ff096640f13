"""Open what an evaluation compares, and refuse what does not belong together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from memfree.evaluation.manifest_fields import DATASET, INDEX, SAMPLES
from memfree.folders.manifest import read_manifest
from memfree.untrusted import check_fields, short

if TYPE_CHECKING:
    from memfree.data import DatasetFolder
    from memfree.retrieval import ReferenceIndex
    from memfree.sampling.folder import SampleFolder

HELD_OUT_PARTS: tuple[Literal["calibration", "test", "fit"], ...] = ("calibration", "test", "fit")
"""Thresholds, rates of real images, and the classifier: three purposes, three disjoint parts."""


@dataclass(frozen=True)
class Inputs:
    """A data set, its index, and the sample folders to judge, all of the same data."""

    dataset: DatasetFolder
    index: ReferenceIndex
    samples: dict[str, SampleFolder]
    paired: dict[str, str]
    """Subject to the reference that started from the same noise under the same conditions."""
    reference: str
    """The subject that the others are compared with."""


def open_inputs(
    dataset: Path,
    index: Path,
    samples: dict[str, Path],
    reference: str,
    other_data: tuple[str, ...],
) -> Inputs:
    """Open everything and check that it belongs together.

    Args:
        dataset: dataset folder.
        index: reference index folder over its train part.
        samples: subject to sample folder.
        reference: the subject that others are paired with; the first one if there is no such.
        other_data: subjects whose model was trained on another data set on purpose.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: there are no samples, a held-out part is empty, index or samples are of
            another data set or image shape, or samples were steered by other features.
    """
    from memfree.data import DatasetFolder
    from memfree.evaluation.metrics import CHANGED, HELDOUT
    from memfree.evaluation.subject import DEFAULT_REFERENCE
    from memfree.retrieval import ReferenceIndex
    from memfree.sampling.folder import SampleFolder

    if not samples:
        raise ValueError("no samples to evaluate: give at least one --samples.NAME FOLDER")
    if taken := {HELDOUT, CHANGED} & samples.keys():
        raise ValueError(f"--samples.{min(taken)}: this name is taken; choose another")
    data = DatasetFolder(dataset)
    for part in HELD_OUT_PARTS:
        data.part(part)  # refuses an empty one
    references = ReferenceIndex.load(index)
    if references.dataset_hash is not None and references.dataset_hash != data.hash:
        raise ValueError(
            f"--index {index} is of another data set than --dataset {dataset}; "
            "build it with `memfree index` from this one"
        )
    check_fields(data.manifest, DATASET, f"{dataset}/manifest.json")
    check_fields(read_manifest(index, "index"), INDEX, f"{index}/manifest.json")
    folders = {name: SampleFolder(path) for name, path in samples.items()}
    for name, folder in folders.items():
        check_fields(folder.manifest, SAMPLES, f"{folder.path}/manifest.json")
        _check_samples(name, folder, data, other_data)
        _check_unseen(name, folder, references)
    if reference not in folders:
        if reference != DEFAULT_REFERENCE:
            raise ValueError(
                f"--reference {reference} is none of the samples: {', '.join(folders)}"
            )
        reference = next(iter(folders))
    paired = {
        name: reference
        for name, folder in folders.items()
        if name != reference and same_noise(folder, folders[reference])
    }
    return Inputs(data, references, folders, paired, reference)


def _check_samples(
    name: str, folder: SampleFolder, data: DatasetFolder, other_data: tuple[str, ...]
) -> None:
    if len(folder) == 0:
        raise ValueError(f"--samples.{name} {folder.path} holds no samples")
    if tuple(folder.image_shape) != tuple(data.image_shape):
        raise ValueError(
            f"--samples.{name} {folder.path} has images of shape {tuple(folder.image_shape)}, "
            f"the data set has {tuple(data.image_shape)}"
        )
    found = folder.manifest.get("dataset_hash")
    if name not in other_data and found is not None and found != data.hash:
        raise ValueError(
            f"--samples.{name} {folder.path} is of a model of another data set than --dataset "
            f"{data.path}; name it in --other_data if that is what you want to compare"
        )


def _check_unseen(name: str, folder: SampleFolder, index: ReferenceIndex) -> None:
    """Refuse samples steered by other features than the index's: the second measure's, perhaps."""
    own = index.features.describe()["name"]
    steered_by = folder.manifest.get("index_features")
    if folder.manifest.get("mitigation") != "none" and steered_by not in (None, own):
        raise ValueError(
            f"--samples.{name} {folder.path} was steered by an index of {short(steered_by, 40)}, "
            f"--index is of {own}: the second measure would be what steered; give the index that "
            "steered"
        )


def same_noise(first: SampleFolder, second: SampleFolder) -> bool:
    """Whether sample i of both began with the same noise and the same condition.

    Rejected samples were drawn again from other noise.
    """
    import torch

    if "reject" in (first.manifest.get("mitigation"), second.manifest.get("mitigation")):
        return False
    if len(first) != len(second) or not torch.equal(first.seeds, second.seeds):
        return False
    if first.captions != second.captions:
        return False
    if first.conditions is None or second.conditions is None:
        return first.conditions is second.conditions
    return torch.equal(first.conditions, second.conditions)


def labels_of(folder: SampleFolder) -> np.ndarray | None:
    """(n,) the classes that samples were asked for, None if unconditional."""
    return None if folder.conditions is None else folder.conditions.numpy()
