"""Evaluation folder: read and checked; fields of the manifests that an evaluation rests on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from memfree.evaluation.metrics import (
    COPIES_AT,
    COPIES_OF_FACTOR,
    HELDOUT,
    Metric,
    MetricTable,
    read_metrics,
)
from memfree.folders.manifest import read_manifest
from memfree.folders.untrusted import Maybe, Number, check_fields, read_table, short

_SIDE = Number(1, 1 << 20, whole=True)
_COUNT = Number(0, 1 << 53, whole=True)
_COMMAND = {"command": [str]}
_MADE_BY = {
    **_COMMAND,
    "packages": {str: (str, NoneType)},
    "python": str,
    "device": str,
    "created": str,
    "seed": (int, NoneType),
    "git_commit": Maybe(str),
}
# Fields of the manifests of a dataset folder, a reference index, a sample folder, the model that
# drew samples, and an evaluation, which holds those of what it was made from.
DATASET: dict[Any, Any] = {
    "made_by": _COMMAND,
    "image_shape": [_SIDE],
    "source": Maybe({"name": Maybe(str), "licence": Maybe(str)}),
    "parts": Maybe({str: {"images": Maybe(_COUNT), "records": Maybe(_COUNT)}}),
    "plan": Maybe({"ladder": Maybe([Number()]), "factor": Maybe(Number()), "kinds": Maybe([str])}),
    "repeated_images": Maybe(_COUNT),
}
INDEX: dict[Any, Any] = {
    "made_by": _COMMAND,
    "rows": Maybe(_COUNT),
    "metric": Maybe(str),
    "features": Maybe({"name": Maybe(str)}),
}
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
MODEL: dict[Any, Any] = {
    "made_by": _COMMAND,
    "parameters": Maybe(Number(0)),
    "exposures": Maybe({"largest": Maybe(Number(0))}),
}
EVALUATION: dict[Any, Any] = {
    "made_by": _MADE_BY,
    "reference": str,
    "paired": {str: str},
    "false_positive_rate": Number(0, 1),
    "dataset": {"manifest": DATASET, "hash": str},
    "index": {"manifest": INDEX},
    "samples": {str: {"manifest": SAMPLES, "model": Maybe(MODEL)}},
}
_COPIES = {"threshold": Number(), "false_positive_rate": Number(0, 1)}
_PICTURES = {
    "column": pa.int64(),
    "subject": pa.string(),
    "sample": pa.int64(),
    "key": pa.string(),
    "multiplicity": pa.int64(),
    "sigma": pa.float64(),
    "copy": pa.bool_(),
    "png": pa.binary(),
}
_TRAJECTORIES = {
    "subject": pa.string(),
    "group": pa.string(),
    **{name: pa.float64() for name in ("t", "lambda", "q10", "q25", "q50", "q75", "q90")},
}


class EvaluationFolder:
    """What `memfree evaluate` wrote.

    Args:
        path: the folder.

    Attributes:
        manifest: its manifest.
        metrics: its metrics.
        subjects: names of the sample folders, the reference first.
        reference: the subject that others are compared with.
        paired: subjects that began with the reference's noise.
        pictures: rows of ``pictures.parquet``.
        trajectories: rows of ``trajectories.parquet``.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is unfinished, of another kind, or damaged.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.manifest: dict[str, Any] = read_manifest(self.path, "evaluation")
        self.metrics: MetricTable = read_metrics(self.path / "metrics.json")
        with self._named("manifest.json"):
            check_fields(self.manifest, EVALUATION, "manifest")
            self.reference: str = self.manifest["reference"]
            names = list(self.manifest["samples"])
            self.subjects = sorted(names, key=lambda name: name != self.reference)
            self.paired = [name for name in self.subjects if name in self.manifest["paired"]]
            if self.reference not in names:
                raise ValueError(f"reference {short(repr(self.reference), 40)} is not in samples")
            if len(self.manifest["dataset"]["manifest"]["image_shape"]) != 3:
                raise ValueError("manifest.dataset.manifest.image_shape is not (C, H, W)")
        self.pictures = self._rows("pictures.parquet", _PICTURES, ("subject", "sigma", "copy"))
        self.trajectories = self._rows("trajectories.parquet", _TRAJECTORIES, ("lambda",))

    def check_figures(self) -> None:
        """Refuse metrics and pictures from which no page can be drawn.

        Raises:
            ValueError: a subject has no rate of copies, or a metric lacks what the page says of it.
        """
        with self._named("metrics.json"):
            for name in [*self.subjects, HELDOUT]:
                if self.metrics.get("copies", name) is None:
                    raise ValueError(f"copies of {short(name, 40)} are missing")
            for found in self.metrics.metrics:
                _check_metric(found)
        with self._named("pictures.parquet"):
            cells = {(row["subject"], row["column"]) for row in self.pictures}
            for column in {column for _, column in cells}:
                for subject in (None, self.reference, *self.paired):
                    if (subject, column) not in cells:
                        raise ValueError(f"column {column} has no picture of {short(subject, 40)}")
            for row in self.pictures:
                if row["subject"] is not None and None in (row["sigma"], row["copy"]):
                    raise ValueError(f"a picture of {short(row['subject'], 40)} has no verdict")

    def distances(self) -> dict[str, np.ndarray]:
        """Per subject and for the test images: nL2 of every image, or −σ of another measure."""
        with self._named("per_sample.parquet"):
            columns = {"subject": pa.string(), "sigma": pa.float64()}
            table = read_table(self.path / "per_sample.parquet", columns)
            subject = np.array(table["subject"].to_pylist(), dtype=object)
            values = -table["sigma"].to_numpy()
            distances = {name: values[subject == name] for name in [*self.subjects, HELDOUT]}
            for name, own in distances.items():
                if not len(own):
                    raise ValueError(f"it has no images of {short(name, 40)}")
                if not np.isfinite(own).all():
                    raise ValueError(f"sigma of {short(name, 40)} is not finite")
        return distances

    def _rows(
        self, name: str, columns: dict[str, pa.DataType], nullable: tuple[str, ...]
    ) -> list[dict[str, Any]]:
        """Rows of a table that may be empty, and then has no columns."""
        with self._named(name):
            table = read_table(self.path / name)
            for column, kind in columns.items() if table.num_rows else ():
                if column not in table.column_names:
                    raise ValueError(f"it has no column {column}")
                found = table[column]
                if found.type != kind and not (column in nullable and pa.types.is_null(found.type)):
                    raise ValueError(f"its column {column} is of type {found.type}, not {kind}")
                if found.null_count and column not in nullable:
                    raise ValueError(f"its column {column} has missing values")
                if pa.types.is_floating(found.type) and (
                    pc.all(pc.is_finite(found.drop_null())).as_py() is False
                ):
                    raise ValueError(f"its column {column} is not finite")
            return table.to_pylist()

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Name the file in what is wrong with it."""
        path = self.path / name
        try:
            yield
        except (OSError, ValueError) as error:
            text = str(error).removeprefix(f"{path} ").removeprefix("cannot be read: ")
            raise ValueError(
                f"{path} cannot be used: {short(text, 300)}; run `memfree evaluate` again"
            ) from error


def _check_metric(found: Metric) -> None:
    """Refuse a metric from which the page cannot say what it says."""
    name = f"{short(found.metric, 40)} of {short(found.subject, 40)}"
    if found.metric == "copies":
        check_fields(found.detail, _COPIES, f"{name}: detail")
        ends = (found.low, found.value, found.high)
        if not all(end is not None and 0 <= end <= 1 for end in ends) or found.count < 1:
            raise ValueError(f"{name} is not a rate with an interval")
    if found.metric == "second_copies":
        check_fields(found.detail, {"similarity": str}, f"{name}: detail")
    for prefix, is_valid in ((COPIES_AT, _is_number), (COPIES_OF_FACTOR, str.isdecimal)):
        if found.metric.startswith(prefix):
            text = found.metric.removeprefix(prefix)
            if len(text) > 20 or not is_valid(text):
                raise ValueError(f"{name} is not a rate or factor")
            if found.count < 1:
                raise ValueError(f"{name} was measured on no image")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
