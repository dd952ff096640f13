"""Read a finished evaluation folder."""

from __future__ import annotations

import functools
import operator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from memfree.evaluation.metrics import HELDOUT, MetricTable, read_metrics
from memfree.folders.manifest import read_manifest
from memfree.untrusted import read_table, short


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
        try:
            self.reference: str = self.manifest["reference"]
            names = list(self.manifest["samples"])
            self.subjects = sorted(names, key=lambda name: name != self.reference)
            self.paired = [name for name in self.subjects if name in self.manifest["paired"]]
            if self.reference not in names:
                raise TypeError(f"the reference {short(repr(self.reference))} is no subject")
            _check_makers(self.manifest)
        except KeyError as error:
            raise ValueError(
                f"{self.path}/manifest.json lacks {error}; run `memfree evaluate` again"
            ) from error
        except (AttributeError, IndexError, TypeError) as error:
            raise ValueError(
                f"{self.path}/manifest.json is damaged ({short(error)}); run `memfree evaluate` "
                "again"
            ) from error
        self.pictures = self._table("pictures.parquet").to_pylist()
        self.trajectories = self._table("trajectories.parquet").to_pylist()

    def distances(self) -> dict[str, np.ndarray]:
        """Per subject and for the test images: nL2 of every image, or −σ of another measure."""
        table = self._table("per_sample.parquet", {"subject": pa.string(), "sigma": pa.float64()})
        subject = np.array(table["subject"].to_pylist())
        values = -table["sigma"].to_numpy()
        return {name: values[subject == name] for name in [*self.subjects, HELDOUT]}

    def _table(self, name: str, columns: dict[str, pa.DataType] | None = None) -> pa.Table:
        try:
            return read_table(self.path / name, columns)
        except (OSError, ValueError) as error:
            raise ValueError(f"{error}; run `memfree evaluate` again") from error


def _check_makers(manifest: dict[str, Any]) -> None:
    """Refuse a manifest without what the report says of how the evaluation was made.

    Raises:
        AttributeError, KeyError, IndexError, TypeError: something of it is not there.
    """
    samples = manifest["samples"].values()
    for name in ("packages", "python", "device", "created", "seed"):
        _look_up(manifest, "made_by", name)
    _look_up(manifest, "made_by", "command", 0)
    for made in (manifest["dataset"], manifest["index"], *samples):
        _look_up(made, "manifest", "made_by", "command", 0)
    for sample in samples:
        _look_up(sample, "manifest", "count")
        if _look_up(sample, "model") is not None:
            _look_up(sample, "model", "made_by", "command", 0)
    _look_up(manifest, "dataset", "manifest", "image_shape")
    _look_up(manifest, "dataset", "hash")
    _look_up(manifest, "false_positive_rate")


def _look_up(value: Any, *keys: str | int) -> Any:
    return functools.reduce(operator.getitem, keys, value)
