"""What an evaluation reads: dataset, index, and the subjects it compares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from memfree.folders.manifest import read_manifest
from memfree.folders.untrusted import Maybe, Number, check_fields, short

if TYPE_CHECKING:
    from memfree.data import DatasetFolder
    from memfree.evaluation.embedding import View
    from memfree.evaluation.neighbours import Neighbours
    from memfree.retrieval import ReferenceIndex
    from memfree.sampling.sample_folder import SampleFolder

_SIDE = Number(1, 1 << 20, whole=True)
_COUNT = Number(0, 1 << 53, whole=True)
_MADE_BY = {
    "command": [str],
    "packages": {str: (str, NoneType)},
    "python": str,
    "device": str,
    "created": str,
    "seed": (int, NoneType),
    "git_commit": Maybe(str),
}
_COMMAND = {"command": [str]}
DATASET: dict[Any, Any] = {
    "made_by": _COMMAND,
    "image_shape": [_SIDE],
    "source": Maybe({"name": Maybe(str), "licence": Maybe(str)}),
    "parts": Maybe({str: {"images": Maybe(_COUNT), "records": Maybe(_COUNT)}}),
    "plan": Maybe({"ladder": Maybe([Number()]), "factor": Maybe(Number()), "kinds": Maybe([str])}),
    "repeated_images": Maybe(_COUNT),
}
"""Of a dataset folder."""
INDEX: dict[Any, Any] = {
    "made_by": _COMMAND,
    "rows": Maybe(_COUNT),
    "metric": Maybe(str),
    "features": Maybe({"name": Maybe(str)}),
}
"""Of a reference index."""
SAMPLES: dict[Any, Any] = {
    "made_by": {**_COMMAND, "device": Maybe(str)},
    "count": _COUNT,
    "mitigation": Maybe(str),
    "index_features": Maybe(str),
    "model": Maybe(str),
    "dataset_hash": Maybe(str),
    "seconds_per_sample": Maybe(Number(0)),
    "peak_memory_bytes": Maybe(Number(0)),
}
"""Of a sample folder."""
MODEL: dict[Any, Any] = {
    "made_by": _COMMAND,
    "parameters": Maybe(Number(0)),
    "exposures": Maybe({"largest": Maybe(Number(0))}),
}
"""Of the model that drew samples."""
EVALUATION: dict[Any, Any] = {
    "made_by": _MADE_BY,
    "reference": str,
    "paired": {str: str},
    "false_positive_rate": Number(0, 1),
    "dataset": {"manifest": DATASET, "hash": str},
    "index": {"manifest": INDEX},
    "samples": {str: {"manifest": SAMPLES, "model": Maybe(MODEL)}},
}
"""Of an evaluation, with those of what it was made from."""


@dataclass
class Subject:
    """A sample folder, or the test images, with what was found of each of the n images."""

    name: str
    found: Neighbours
    view: View
    labels: np.ndarray | None
    """(n,) the class that was asked for; of test images, their own."""
    second_sigma: np.ndarray
    """(n,) the second similarity."""
    second_copy: np.ndarray
    """(n,) bool: its verdict."""
    conditions: np.ndarray | None = None
    """(n,) of ``shared_conditions``: number of the caption that a sample was asked for, where
    several share one; None for independent images, as test images are, and samples of classes."""
    captions: list[str] | None = None
    """The n captions that samples were asked for."""
    agrees: np.ndarray | None = None
    """(≤ n,) bool: the classifier sees the class that was asked for; without the samples of classes
    that it does not know."""
    agrees_conditions: np.ndarray | None = None
    """(≤ n,) of ``shared_conditions``, of the samples of ``agrees``."""


DEFAULT_REFERENCE = "unguided"
"""Samples that others are compared with; where there are none of this name, the first."""


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
    from memfree.retrieval import ReferenceIndex
    from memfree.sampling.sample_folder import SampleFolder

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
