"""Evaluation folder: metrics, one row for each sample, pictures, trajectories, written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet
from torch import Tensor

from memfree.data import DatasetFolder
from memfree.evaluation.folder import MODEL
from memfree.evaluation.inputs import Inputs, Subject
from memfree.evaluation.metrics import Metric, MetricTable, metric, write_metrics
from memfree.evaluation.neighbours import Neighbours
from memfree.folders.atomic import put_in_place, unfinished
from memfree.folders.claim import claim
from memfree.folders.manifest import read_manifest, save_config, write_manifest
from memfree.folders.untrusted import check_fields
from memfree.guidance import WITH_AMG, NormalizedL2
from memfree.images import to_bytes, to_png
from memfree.sampling.sample_folder import SampleFolder

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)  # of σ_t over the samples of a group, at every step
COLUMNS = 12  # samples of the reference subject that are shown


def write_evaluation(
    out: Path,
    inputs: Inputs,
    index_path: Path,
    table: MetricTable,
    subjects: Mapping[str, Subject],
    seed: int,
    false_positive_rate: float,
) -> None:
    """Write the folder beside ``out`` and put it in place when it is complete."""
    with unfinished(out) as partial:
        write_metrics(partial / "metrics.json", table.metrics)
        nl2 = isinstance(inputs.similarity, NormalizedL2)
        for name, rows in (
            ("per_sample", _per_sample_table(subjects, inputs.index.keys, nl2)),
            ("trajectories", pa.Table.from_pylist(_trajectories(inputs, subjects))),
            ("pictures", pa.Table.from_pylist(_pictures(inputs, subjects))),
        ):
            parquet.write_table(rows, partial / f"{name}.parquet")
        save_config(partial)
        write_manifest(
            partial,
            "evaluation",
            seed,
            contains="pictures.parquet and the report contain training images",
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


def _described(path: Path, manifest: dict[str, Any], data_hash: str | None) -> dict[str, Any]:
    """Where an input is, and its manifest: what the evaluation was made from."""
    kept = {name: value for name, value in manifest.items() if name not in ("shards", "files")}
    return {"path": str(path), "hash": data_hash, "manifest": kept}


def _model_manifest(path: str | None) -> dict[str, Any] | None:
    """Manifest of the model that drew samples, None if it is no longer where it was."""
    if path is None:
        return None
    try:
        manifest = read_manifest(Path(path), "model")
        check_fields(manifest, MODEL, "manifest")
        return manifest
    except (OSError, ValueError):
        return None


def _per_sample_table(subjects: Mapping[str, Subject], keys: list[str], nl2: bool) -> pa.Table:
    """One row per image: its nearest training image, both similarities, p-value and verdicts."""
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


def _trace(folder: SampleFolder) -> dict[str, np.ndarray] | None:
    """Columns of the folder's trace as float64, None for samples that were drawn without an index.

    Null and absent values are NaN, except that absent activity is 0.
    """
    if not any(folder.path.glob("trace-*.parquet")):
        return None
    table = folder.trace()
    columns = {}
    for name in ("sample", "step", "t", "sigma", "lambda", "active"):
        if name in table.column_names:
            kind = pa.int8() if name == "active" else pa.float64()
            columns[name] = table[name].cast(kind).to_numpy().astype(np.float64)
        else:
            columns[name] = np.full(table.num_rows, 0.0 if name == "active" else np.nan)
    return columns


def cost_metrics(inputs: Inputs) -> list[Metric]:
    """Time and memory from the sample manifests, share of active steps from the traces."""
    metrics = []
    for name, folder in inputs.samples.items():
        manifest, n = folder.manifest, len(folder)
        made_on = {"device": manifest["made_by"].get("device"), "steps": manifest.get("steps")}
        for cost in ("seconds_per_sample", "peak_memory_bytes"):
            if manifest.get(cost) is not None:
                metrics.append(metric(cost, name, float(manifest[cost]), n, **made_on))
        if manifest.get("mitigation") in WITH_AMG and (trace := _trace(folder)) is not None:
            metrics.append(metric("active_share", name, float(trace["active"].mean()), n))
    return metrics


def _trajectories(inputs: Inputs, subjects: Mapping[str, Subject]) -> list[dict[str, object]]:
    """Quantiles of σ_t of copies and others, a row per subject, group and step.

    Guided samples are grouped by what their noise became unguided.
    """
    rows: list[dict[str, object]] = []
    for name, folder in inputs.samples.items():
        trace = _trace(folder)
        if trace is None:
            continue
        judged = subjects[inputs.paired.get(name, name)].found.copy
        for group, members in (
            ("copies", np.flatnonzero(judged)),
            ("others", np.flatnonzero(~judged)),
        ):
            chosen = np.isin(trace["sample"], members)
            for step in np.unique(trace["step"][chosen]):
                here = chosen & (trace["step"] == step)
                sigma = trace["sigma"][here]
                sigma = sigma[np.isfinite(sigma)]
                if len(sigma) == 0:
                    continue
                limit = float(trace["lambda"][here][0])
                quantiles = np.quantile(sigma, QUANTILES).tolist()
                rows.append(
                    {
                        "subject": name,
                        "group": group,
                        "samples": len(members),
                        "step": int(step),
                        "t": float(trace["t"][here][0]),
                        "lambda": limit if np.isfinite(limit) else None,
                        "active": float(trace["active"][here].mean()),
                        **{
                            f"q{round(100 * q)}": value
                            for q, value in zip(QUANTILES, quantiles, strict=True)
                        },
                    }
                )
    return rows


def _pictures(inputs: Inputs, subjects: Mapping[str, Subject]) -> list[dict[str, object]]:
    """Samples of the reference and of all that share its noise, and their nearest training images.

    One row a picture, with what is written under it.
    """
    keys = inputs.index.keys
    nearest = subjects[inputs.reference].found
    nearest_keys = [keys[row] for row in nearest.row]
    chosen = choose_samples(nearest, nearest_keys)
    sources = training_images(inputs.dataset, {nearest_keys[sample] for sample in chosen})
    drawn = {name: inputs.samples[name].images() for name in (inputs.reference, *inputs.paired)}
    rows: list[dict[str, object]] = []
    for column, sample in enumerate(chosen):
        key = nearest_keys[sample]
        cells: list[tuple[str | None, Neighbours, str, Tensor]] = [
            (None, nearest, key, sources[key])
        ]
        for name, images in drawn.items():
            found = subjects[name].found
            cells.append((name, found, keys[int(found.row[sample])], images[sample]))
        for subject, found, key, image in cells:
            rows.append(
                {
                    "column": column,
                    "subject": subject,
                    "sample": sample,
                    "key": key,
                    "multiplicity": int(found.multiplicity[sample]),
                    "sigma": None if subject is None else float(found.sigma[sample]),
                    "copy": None if subject is None else bool(found.copy[sample]),
                    "png": to_png(to_bytes(image)),
                }
            )
    return rows


def choose_samples(found: Neighbours, keys: list[str], count: int = COLUMNS) -> list[int]:
    """Which samples of the reference subject to show, by a rule and not by looking.

    Copies first, in the order of the samples, each of another training image (``keys``); then, if
    there are too few, further copies, then what is nearest to a training image.
    """
    seen: set[str] = set()
    first: list[int] = []
    again: list[int] = []
    for sample in np.flatnonzero(found.copy).tolist():
        (again if keys[sample] in seen else first).append(sample)
        seen.add(keys[sample])
    others = [i for i in np.argsort(-found.sigma, kind="stable").tolist() if not found.copy[i]]
    return (first + again + others)[:count]


def training_images(
    dataset: DatasetFolder, wanted: set[str], batch_size: int = 1024
) -> dict[str, Tensor]:
    """The training images of these keys, without holding all of them in memory."""
    train = dataset.part("train")
    images, start = {}, 0
    for batch in train.batches(batch_size):
        for place, key in enumerate(train.keys[start : start + len(batch)]):
            if key in wanted:
                images[key] = batch[place]
        start += len(batch)
    return images
