"""Evaluation folder: metrics, one row for each sample, pictures, trajectories, written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from memfree.evaluation.inputs import MODEL, Inputs, Subject
from memfree.evaluation.metrics import MetricTable, write_metrics
from memfree.evaluation.pictures import choose_samples, picture_rows, training_images
from memfree.folders.atomic import put_in_place, unfinished
from memfree.folders.claim import claim
from memfree.folders.manifest import read_manifest, save_config, write_manifest
from memfree.folders.untrusted import check_fields
from memfree.guidance import NormalizedL2, default_similarity
from memfree.sampling.sample_folder import SampleFolder

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Of σ_t over the samples of a group, at every step."""


def trajectory_rows(
    subject: str, trace: pa.Table, groups: dict[str, np.ndarray]
) -> list[dict[str, object]]:
    """Quantiles of σ_t per step for groups of samples.

    Args:
        subject: name in the rows.
        trace: of a sample folder: ``sample``, ``step``, ``t``, ``sigma``, ``lambda``, ``active``.
        groups: group name to the sample numbers in it; empty groups are left out.

    Returns:
        One row a group and step: subject, group, samples, step, t, lambda, active (share) and
        the quantiles q10, q25, q50, q75, q90.
    """
    columns = {
        name: _column(trace, name) for name in ("sample", "step", "t", "sigma", "lambda", "active")
    }
    rows: list[dict[str, object]] = []
    for group, members in groups.items():
        chosen = np.isin(columns["sample"], members)
        for step in np.unique(columns["step"][chosen]):
            here = chosen & (columns["step"] == step)
            sigma = columns["sigma"][here]
            sigma = sigma[np.isfinite(sigma)]
            if len(sigma) == 0:
                continue
            quantiles = np.quantile(sigma, QUANTILES)
            rows.append(
                {
                    "subject": subject,
                    "group": group,
                    "samples": len(members),
                    "step": int(step),
                    "t": float(columns["t"][here][0]),
                    "lambda": _finite_or_none(columns["lambda"][here][0]),
                    "active": float(columns["active"][here].mean()),
                    **{
                        f"q{round(100 * q)}": float(value)
                        for q, value in zip(QUANTILES, quantiles, strict=True)
                    },
                }
            )
    return rows


def trace_of(folder: SampleFolder) -> pa.Table | None:
    """The folder's trace, None for samples that were drawn without an index."""
    return folder.trace() if any(folder.path.glob("trace-*.parquet")) else None


def active_share(trace: pa.Table) -> float:
    """Share of all steps of all samples at which a guidance was active."""
    return float(_column(trace, "active").mean())


def _column(trace: pa.Table, name: str) -> np.ndarray:
    """A column as float64; null and absent are NaN, except that absent activity is none."""
    if name not in trace.column_names:
        return np.full(trace.num_rows, 0.0 if name == "active" else np.nan)
    values = trace[name].cast(pa.float64()) if name != "active" else trace[name].cast(pa.int8())
    return values.to_numpy().astype(np.float64)


def _finite_or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


CONTAINS = "pictures.parquet and the report contain training images"


def write_evaluation(
    out: Path,
    inputs: Inputs,
    index_path: Path,
    table: MetricTable,
    subjects: Mapping[str, Subject],
    seed: int,
    false_positive_rate: float,
) -> None:
    """Write the folder beside ``out`` and put it in place when it is complete.

    Raises:
        ValueError: ``out`` holds something that is not an evaluation.
    """
    with unfinished(out) as partial:
        write_metrics(partial / "metrics.json", table.metrics)
        nl2 = isinstance(default_similarity(inputs.index), NormalizedL2)
        rows = per_sample_table(subjects, inputs.index.keys, nl2)
        parquet.write_table(rows, partial / "per_sample.parquet")
        _write_rows(partial / "trajectories.parquet", _trajectories(inputs, subjects))
        _write_rows(partial / "pictures.parquet", _pictures(inputs, subjects))
        save_config(partial)
        write_manifest(
            partial,
            "evaluation",
            seed,
            contains=CONTAINS,
            reference=inputs.reference,
            paired=inputs.paired,
            false_positive_rate=false_positive_rate,
            dataset=_described(inputs.dataset.path, inputs.dataset.manifest, inputs.dataset.hash),
            index=_described(index_path, read_manifest(index_path, "index"), None),
            samples={
                name: {
                    **_described(folder.path, folder.manifest, folder.manifest.get("dataset_hash")),
                    "model": _model_manifest(folder.manifest.get("model")),
                }
                for name, folder in inputs.samples.items()
            },
        )
        claim(out, "evaluation")
        put_in_place(partial, out, overwrite=True)


def per_sample_table(subjects: Mapping[str, Subject], keys: list[str], nl2: bool) -> pa.Table:
    """One row an image: its nearest training image, both similarities, p-value and verdicts.

    Args:
        subjects: the sample folders and the test images.
        keys: image key per row of the index.
        nl2: whether σ is −nL2; otherwise the column ``nl2`` is null.
    """
    parts = []
    for name, subject in subjects.items():
        found, n = subject.found, len(subject.found)
        captions: list[str] | list[None] = subject.captions or [None] * n
        labels = [None] * n if subject.labels is None else subject.labels.tolist()
        parts.append(
            pa.table(
                {
                    "subject": pa.array([name] * n),
                    "sample": pa.array(range(n), pa.int64()),
                    "condition": pa.array(labels, pa.int64()),
                    "caption": pa.array(captions, pa.string()),
                    "nearest_key": pa.array([keys[row] for row in found.row]),
                    "nearest_row": found.row,
                    "nearest_multiplicity": found.multiplicity,
                    "nl2": pa.array(-found.sigma if nl2 else [None] * n, pa.float64()),
                    "sigma": found.sigma,
                    "distance_ratio": found.distance_ratio,
                    "p_value": found.p_value,
                    "copy": found.copy,
                    "second_sigma": subject.second_sigma,
                    "second_copy": subject.second_copy,
                }
            )
        )
    return pa.concat_tables(parts)


def _trajectories(inputs: Inputs, subjects: Mapping[str, Subject]) -> list[dict[str, object]]:
    """σ_t of copies and others; guided samples are grouped by what their noise became unguided."""
    rows: list[dict[str, object]] = []
    for name, folder in inputs.samples.items():
        trace = trace_of(folder)
        if trace is None:
            continue
        judged = subjects[inputs.paired.get(name, name)].found.copy
        groups = {"copies": np.flatnonzero(judged), "others": np.flatnonzero(~judged)}
        rows += trajectory_rows(name, trace, groups)
    return rows


def _pictures(inputs: Inputs, subjects: Mapping[str, Subject]) -> list[dict[str, object]]:
    names = [inputs.reference, *inputs.paired]
    keys = inputs.index.keys
    found = subjects[inputs.reference].found
    nearest = [keys[row] for row in found.row]
    chosen = choose_samples(found, nearest)
    wanted = {nearest[sample] for sample in chosen}
    return picture_rows(
        chosen,
        {name: (inputs.samples[name].images(), subjects[name].found) for name in names},
        inputs.reference,
        keys,
        training_images(inputs.dataset, wanted),
    )


def _write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    parquet.write_table(pa.Table.from_pylist(rows), path)


def _described(path: Path, manifest: dict[str, Any], data_hash: str | None) -> dict[str, Any]:
    """Where an input lies, and its manifest, so that the evaluation says what it was made from."""
    kept = {name: value for name, value in manifest.items() if name not in ("shards", "files")}
    return {"path": str(path), "hash": data_hash, "manifest": kept}


def _model_manifest(path: str | None) -> dict[str, Any] | None:
    """Manifest of the model that drew samples, None if it is not where it was any more."""
    try:
        found = None if path is None else read_manifest(Path(path), "model")
        if found is not None:
            check_fields(found, MODEL, "manifest")
        return found
    except (OSError, ValueError):
        return None
