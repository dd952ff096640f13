"""Tables of a study: means over training seeds with intervals, and differences to the oracle."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student_t

from memfree.evaluation.records import read_metrics
from memfree.manifest import write_atomic

_CELL = re.compile(r"(?P<conditioning>[a-z]+)-x(?P<factor>\d+)-seed(?P<seed>\d+)")
Key = tuple[str, int, str, str]
"""Conditioning, duplication factor, subject, metric."""

SHOWN = {
    "copies": ("copies", 100.0, " %"),
    "second_copies": ("copies, second measure", 100.0, " %"),
    "duplicated_share": ("nearest is repeated", 100.0, " %"),
    "frechet_pixels": ("Fréchet, pixels", 1.0, ""),
    "frechet_efficientnet": ("Fréchet, EfficientNet", 1.0, ""),
    "class_agreement": ("class agreement", 100.0, " %"),
    "seconds_per_sample": ("ms a sample", 1000.0, ""),
}
"""Columns of the printed table: title, factor, unit."""

MARGINS = {"copies": 0.005, "duplicated_share": 0.015, "frechet_pixels": 0.15}
"""Goals, fixed beforehand: upper limits of (both − oracle); Fréchet distances relative to it."""


def summarise(out: Path, name: str, console: Console) -> None:
    """Gather every finished evaluation of a study: results.parquet, .csv and .md in ``out``.

    Raises:
        ValueError: nothing is finished yet.
    """
    rows = gather(out, name)
    if not rows:
        raise ValueError(f"{out} has no finished evaluation of the study {name}")
    table = pa.Table.from_pylist(rows)
    write_atomic(out / f"{name}.parquet", lambda path: pq.write_table(table, path))
    write_atomic(out / f"{name}.csv", lambda path: pa_csv.write_csv(table, path))
    values = by_key(rows)
    text = markdown(values) + (differences(values) if name == "oracle" else "")
    write_atomic(out / f"{name}.md", lambda path: _write(path, text))
    console.print(_printed(values))
    console.print(f"Written: {out / name}.parquet, .csv, .md")


def gather(out: Path, name: str) -> list[dict[str, object]]:
    """One row a metric, subject and cell of every evaluation below ``out``."""
    rows: list[dict[str, object]] = []
    for manifest in sorted(out.glob(f"*/evaluation-{name}/manifest.json")):
        cell = _CELL.fullmatch(manifest.parent.parent.name)
        if cell is None:
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


def by_key(rows: list[dict[str, object]]) -> dict[Key, dict[int, float]]:
    """Values by training seed of every conditioning, factor, subject and metric."""
    values: dict[Key, dict[int, float]] = defaultdict(dict)
    for row in rows:
        key = (row["conditioning"], row["factor"], row["subject"], row["metric"])
        values[key].setdefault(row["training_seed"], row["value"])  # type: ignore[index,arg-type]
    return dict(values)


def mean_and_half_width(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """Mean over training seeds and half of its two-sided interval (Student's t); NaN for one."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, math.nan
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, float(student_t.ppf((1 + level) / 2, n - 1)) * deviation / math.sqrt(n)


def upper_limit(values: list[float], level: float = 0.95) -> float:
    """One-sided upper limit of the mean over training seeds (Student's t); NaN for one."""
    n = len(values)
    mean, half = mean_and_half_width(values, 2 * level - 1)
    return mean + half if n > 1 else math.nan


def markdown(values: dict[Key, dict[int, float]]) -> str:
    """A table a cell: subjects down, metrics across, mean ± half width over training seeds."""
    parts = []
    for conditioning, factor in sorted({(key[0], key[1]) for key in values}, reverse=False):
        subjects = _subjects(values, conditioning, factor)
        columns = [
            metric
            for metric in SHOWN
            if any((conditioning, factor, subject, metric) in values for subject in subjects)
        ]
        seeds = max(
            len(values.get((conditioning, factor, subject, "copies"), {})) for subject in subjects
        )
        lines = [
            f"### {conditioning}, repeated images × {factor} ({seeds} training seeds)",
            "",
            "| | " + " | ".join(SHOWN[metric][0] for metric in columns) + " |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for subject in subjects:
            cells = [
                _cell(values.get((conditioning, factor, subject, one)), one) for one in columns
            ]
            lines.append(f"| {subject} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def differences(values: dict[Key, dict[int, float]], subject: str = "both") -> str:
    """The goal of a mitigation: (subject − oracle) per training seed, with its upper limit."""
    lines = [
        "",
        f"### {subject} − oracle",
        "",
        "Mean over training seeds of the difference, and its one-sided 95 % upper limit "
        "(Student's t over seeds); Fréchet distances relative to the oracle's.",
        "",
        "| | oracle at | metric | difference | upper limit | margin | |",
        "|---|---|---|---|---|---|---|",
    ]
    for conditioning, factor in sorted({(key[0], key[1]) for key in values}):
        for oracle in ("oracle_steps", "oracle_epochs"):
            for metric, margin in MARGINS.items():
                own = values.get((conditioning, factor, subject, metric), {})
                other = values.get((conditioning, factor, oracle, metric), {})
                seeds = sorted(own.keys() & other.keys())
                if not seeds:
                    continue
                relative = metric.startswith("frechet")
                each = [
                    own[seed] / other[seed] - 1 if relative else own[seed] - other[seed]
                    for seed in seeds
                ]
                mean, limit = sum(each) / len(each), upper_limit(each)
                unit = " %" if relative else " points"
                verdict = "within" if limit <= margin else "not within"
                lines.append(
                    f"| {conditioning} × {factor} | equal {oracle.removeprefix('oracle_')} | "
                    f"{SHOWN[metric][0]} | {100 * mean:+.2f}{unit} | {100 * limit:+.2f}{unit} | "
                    f"{100 * margin:+.1f}{unit} | {verdict} |"
                )
    return "\n".join(lines) + "\n"


def _subjects(values: dict[Key, dict[int, float]], conditioning: str, factor: int) -> list[str]:
    found = [key[2] for key in values if key[:2] == (conditioning, factor)]
    ordered = list(dict.fromkeys(found))
    return [one for one in ordered if (conditioning, factor, one, "copies") in values]


def _cell(by_seed: dict[int, float] | None, metric: str) -> str:
    if not by_seed:
        return ""
    _, scale, unit = SHOWN[metric]
    mean, half = mean_and_half_width(list(by_seed.values()))
    spread = "" if math.isnan(half) else f" ± {scale * half:.2f}"
    return f"{scale * mean:.2f}{spread}{unit}"


def _printed(values: dict[Key, dict[int, float]]) -> Table:
    table = Table(title="Means over training seeds")
    for title in ("model", "subject", *(SHOWN[metric][0] for metric in SHOWN)):
        table.add_column(title)
    for conditioning, factor in sorted({(key[0], key[1]) for key in values}):
        for subject in _subjects(values, conditioning, factor):
            cells = [_cell(values.get((conditioning, factor, subject, one)), one) for one in SHOWN]
            table.add_row(f"{conditioning} × {factor}", subject, *cells)
    return table


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
