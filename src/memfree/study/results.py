"""Tables of a study: means over training seeds with intervals, and differences to the oracle."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Container
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from memfree.evaluation.intervals import Interval
from memfree.evaluation.records import read_metrics
from memfree.manifest import write_atomic, write_text
from memfree.study.statistics import (
    Measured,
    over_seeds,
    rate_over_seeds,
    upper_limit,
    upper_limit_of_rates,
)

_CELL = re.compile(r"(?P<conditioning>[a-z]+)-x(?P<factor>\d+)-seed(?P<seed>\d+)")
Key = tuple[str, int, str, str]
"""Conditioning, duplication factor, subject, metric."""
Values = dict[Key, dict[int, Measured]]
"""What was measured, by key and training seed."""

RATES = {
    "copies": "copies, %",
    "second_copies": "second measure, %",
    "duplicated_share": "nearest is repeated, %",
    "class_agreement": "class agreement, %",
}
DISTANCES = {
    "frechet_pixels": "Fréchet, pixels",
    "frechet_efficientnet": "Fréchet, EfficientNet",
}
SHOWN = {**RATES, **DISTANCES}
"""Metrics of the tables and their titles. Seconds are left to quiet machines: studies may share
theirs, and the first sampling of a model pays for its warm-up."""

MARGINS = {
    "copies": 0.005,
    "second_copies": 0.005,
    "duplicated_share": 0.015,
    "frechet_pixels": 0.15,
    "frechet_efficientnet": 0.15,
}
"""Goals, fixed beforehand: upper limits of (both − oracle); Fréchet distances relative to it."""


def summarise(out: Path, name: str, cells: Container[str], console: Console) -> Values:
    """Gather the finished evaluations of a study: NAME.parquet, .csv and .md in ``out``.

    Args:
        out: the study's folder.
        name: the study.
        cells: names of the cells that belong to it.
        console: where the table is printed.

    Returns:
        What was measured, by key and training seed.

    Raises:
        ValueError: nothing is finished yet.
    """
    rows = gather(out, name, cells)
    if not rows:
        raise ValueError(f"{out} has no finished evaluation of the study {name}")
    table = pa.Table.from_pylist(rows)
    write_atomic(out / f"{name}.parquet", lambda path: pq.write_table(table, path))
    write_atomic(out / f"{name}.csv", lambda path: pa_csv.write_csv(table, path))
    values = by_key(rows)
    text = markdown(values) + differences(values)
    write_text(out / f"{name}.md", text)
    console.print(_printed(values))
    console.print(f"Written: {out / name}.parquet, .csv, .md")
    return values


def gather(out: Path, name: str, cells: Container[str]) -> list[dict[str, Any]]:
    """One row a metric, subject and cell of the evaluations below ``out``."""
    rows: list[dict[str, Any]] = []
    for manifest in sorted(out.glob(f"*/evaluation-{name}/manifest.json")):
        folder = manifest.parent.parent.name
        cell = _CELL.fullmatch(folder)
        if cell is None or folder not in cells:
            continue
        for one in read_metrics(manifest.parent / "metrics.json").metrics:
            rows.append(
                {
                    "conditioning": cell["conditioning"],
                    "factor": int(cell["factor"]),
                    "training_seed": int(cell["seed"]),
                    "subject": one.subject,
                    "metric": one.metric,
                    "value": float(one.value),
                    "low": one.low,
                    "high": one.high,
                    "count": one.count,
                }
            )
    return rows


def by_key(rows: list[dict[str, Any]]) -> Values:
    """What was measured, by conditioning, factor, subject and metric, then by training seed."""
    values: Values = defaultdict(dict)
    for row in rows:
        key = (row["conditioning"], row["factor"], row["subject"], row["metric"])
        values[key].setdefault(row["training_seed"], Measured(row["value"], row["count"]))
    return dict(values)


def markdown(values: Values) -> str:
    """A table a cell: subjects down, metrics across, means over seeds with 95 % intervals."""
    parts = []
    for conditioning, factor in _cells(values):
        subjects = _subjects(values, conditioning, factor)
        columns = [
            metric
            for metric in SHOWN
            if any((conditioning, factor, subject, metric) in values for subject in subjects)
        ]
        seeds = max(len(values[conditioning, factor, one, "copies"]) for one in subjects)
        lines = [
            f"### {conditioning}, repeated images × {factor} (training seeds: {seeds})",
            "",
            "| | " + " | ".join(SHOWN[metric] for metric in columns) + " |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for subject in subjects:
            cells = [
                _shown(values.get((conditioning, factor, subject, one)), one) for one in columns
            ]
            lines.append(f"| {subject} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def differences(values: Values, subject: str = "both") -> str:
    """The goal of a mitigation: (subject − oracle), with its upper limit; empty without oracles."""
    rows = []
    for conditioning, factor in _cells(values):
        for oracle in ("oracle_steps", "oracle_epochs"):
            for metric, margin in MARGINS.items():
                own = values.get((conditioning, factor, subject, metric), {})
                other = values.get((conditioning, factor, oracle, metric), {})
                seeds = sorted(own.keys() & other.keys())
                if seeds:
                    pairs = [own[seed] for seed in seeds], [other[seed] for seed in seeds]
                    title = f"{conditioning} × {factor}", oracle.removeprefix("oracle_"), metric
                    rows.append(_difference(*title, *pairs, margin))
    if not rows:
        return ""
    return "\n".join(
        [
            "",
            f"### {subject} − oracle",
            "",
            "Mean difference over training seeds and its one-sided 95 % upper limit: Student's t",
            "over seeds, for rates the larger of that and of Newcombe's limit for the pooled",
            "counts. Fréchet distances are relative to the oracle's.",
            "",
            "| | oracle at equal | metric | difference | upper limit | margin | |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _difference(
    cell: str,
    oracle: str,
    metric: str,
    own: list[Measured],
    other: list[Measured],
    margin: float,
) -> str:
    pairs = list(zip(own, other, strict=True))
    if metric in DISTANCES:
        each, unit = [a.value / b.value - 1 for a, b in pairs], " %"
        limit = upper_limit(each)
    else:
        each, unit = [a.value - b.value for a, b in pairs], " points"
        limit = upper_limit_of_rates(own, other)
    mean = sum(each) / len(each)
    verdict = "within" if limit <= margin else "not within"
    known = f"{100 * limit:+.2f}{unit}"
    if math.isnan(limit):
        known, verdict = "", "one seed"
    return (
        f"| {cell} | {oracle} | {SHOWN[metric].removesuffix(', %')} | {100 * mean:+.2f}{unit} | "
        f"{known} | {100 * margin:+.1f}{unit} | {verdict} |"
    )


def _cells(values: Values) -> list[tuple[str, int]]:
    return sorted({(key[0], key[1]) for key in values})


def _subjects(values: Values, conditioning: str, factor: int) -> list[str]:
    """Subjects of a cell that copies were counted of, in the order of their evaluation."""
    found = dict.fromkeys(key[2] for key in values if key[:2] == (conditioning, factor))
    return [one for one in found if (conditioning, factor, one, "copies") in values]


def _shown(by_seed: dict[int, Measured] | None, metric: str) -> str:
    """Mean over seeds with its interval in parentheses."""
    if not by_seed:
        return ""
    found = interval(by_seed, metric)
    scale = 100 if metric in RATES else 1
    if found.low is None or found.high is None:
        return f"{scale * found.value:.2f}"
    return f"{scale * found.value:.2f} ({scale * found.low:.2f}–{scale * found.high:.2f})"


def interval(by_seed: dict[int, Measured], metric: str) -> Interval:
    """Mean over training seeds of a rate or a distance, with its 95 % interval, never below 0."""
    measured = list(by_seed.values())
    if metric in RATES:
        return rate_over_seeds(measured)
    found = over_seeds([one.value for one in measured])
    return Interval(found.value, found.low and max(found.low, 0.0), found.high)


def _printed(values: Values) -> Table:
    table = Table(title="Means over training seeds, 95 % intervals")
    for title in ("model", "subject", *SHOWN.values()):
        table.add_column(title)
    for conditioning, factor in _cells(values):
        for subject in _subjects(values, conditioning, factor):
            cells = [_shown(values.get((conditioning, factor, subject, one)), one) for one in SHOWN]
            table.add_row(f"{conditioning} × {factor}", subject, *cells)
    return table
