"""Results of a study: gathered from its evaluations, over training seeds."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from rich.console import Console

from memfree.evaluation.intervals import Interval, rate_interval, shared_conditions
from memfree.evaluation.metrics import Metric, metric, read_metrics
from memfree.folders.atomic import write_atomic
from memfree.folders.manifest import save_config, write_manifest
from memfree.folders.untrusted import read_table
from memfree.study.curves import write_against_oracle, write_curves
from memfree.study.grid import LADDER, model_label
from memfree.study.metrics_shown import Measured, Values
from memfree.study.page import printed, write_report
from memfree.study.plan import GridPlan
from memfree.study.summary import SCHEMA, Summary


def summarise(plan: GridPlan, console: Console) -> Summary:
    """Write NAME.parquet, .csv, .md, .png and .html of the finished cells; print the table.

    With an oracle at two factors or more also NAME-against-oracle.png.

    Raises:
        ValueError: nothing is finished yet.
    """
    cells = plan.cells()
    rows = gather(plan)
    if not rows:
        raise ValueError(f"{plan.out} has no finished evaluation of the study {plan.name}")
    to = plan.out / plan.name
    write_rows(to, rows, SCHEMA)
    missing = sum(not plan.evaluated(cell) for cell in cells)
    summary = Summary(plan.name, by_key(rows), rows, missing, len(cells))
    curves, oracle = f"{plan.name}.png", f"{plan.name}-against-oracle.png"
    pictures = {
        curves: write_curves(plan.out / curves, summary),
        oracle: write_against_oracle(plan.out / oracle, summary.values),
    }
    pictures = {name: shows for name, shows in pictures.items() if shows}
    write_report(plan.out, summary, pictures)
    console.print(printed(summary.values))
    if missing:
        console.print(f"{missing} of {len(cells)} cells are not finished and left out")
    say_written(console, f"{to}.parquet, .csv, .html, and .md with intervals")
    for name in pictures:
        say_written(console, f"{plan.out / name}")
    save_config(plan.out)
    write_manifest(plan.out, "study", name=plan.name, cells=[cell.name for cell in cells])
    return summary


def write_rows(to: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> None:
    """Write ``to.parquet`` and ``to.csv``."""
    table = pa.Table.from_pylist(rows, schema=schema)
    write_atomic(Path(f"{to}.parquet"), lambda path: pq.write_table(table, path))
    write_atomic(Path(f"{to}.csv"), lambda path: pa_csv.write_csv(table, path))


def say_written(console: Console, files: str) -> None:
    """Print which files were written."""
    line = f"Written: {files}"
    console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


def metric_rows(described: dict[str, Any], metrics: Iterable[Metric]) -> list[dict[str, Any]]:
    """A row a metric, whose first columns are ``described``."""
    return [
        {
            **described,
            "subject": one.subject,
            "metric": one.metric,
            "value": float(one.value),
            "low": one.low,
            "high": one.high,
            "count": one.count,
        }
        for one in metrics
    ]


def gather(plan: GridPlan) -> list[dict[str, Any]]:
    """One row a finished cell, subject and metric, with the columns ``SCHEMA``."""
    rows: list[dict[str, Any]] = []
    cells = plan.cells()
    ladders = {cell.factors for cell in cells if len(cell.factors) > 1}
    for cell in cells:
        if not plan.evaluated(cell):
            continue
        evaluation, on_ladder = plan.evaluation(cell), len(cell.factors) > 1
        measured = read_metrics(evaluation / "metrics.json").metrics
        if on_ladder:
            measured = [*measured, *ladder_metrics(evaluation / "per_sample.parquet", cell.factors)]
        described = {
            "conditioning": cell.conditioning,
            "factor": LADDER if on_ladder else cell.factors[0],
            "ladder": " ".join(map(str, cell.factors)) if on_ladder else None,
            "size": cell.size or None,
            "model": cell.model,
            "steps": cell.steps or plan.steps,
            "training_seed": cell.seed,
            "label": model_label(cell, several_ladders=len(ladders) > 1),
        }
        samples = plan.samples(cell)
        for row in metric_rows(described, measured):
            folder = samples.get(row["subject"], evaluation)
            rows.append({**row, "folder": os.path.relpath(folder, plan.out)})
    return rows


def ladder_metrics(per_sample: Path, factors: Sequence[int]) -> list[Metric]:
    """``copies_at_factor_F``: of the samples nearest to an image with F copies, those that copy it.

    Unlike copies per image, it does not grow merely because the model draws a repeated image more
    often. Samples near one image resemble each other: intervals are over the images.
    """
    columns = {
        "subject": pa.string(),
        "nearest_multiplicity": pa.int64(),
        "nearest_key": pa.string(),
        "copy": pa.bool_(),
    }
    table = read_table(per_sample, columns)
    metrics = []
    for subject in pc.unique(table["subject"]).to_pylist():
        own = table.filter(pc.equal(table["subject"], subject))
        for factor in factors:
            near = own.filter(pc.equal(own["nearest_multiplicity"], factor))
            if len(near):
                keys = near["nearest_key"].to_pylist()
                copies = near["copy"].to_numpy(zero_copy_only=False)
                rate = rate_interval(copies, shared_conditions(keys))
                if len(keys) > len(set(keys)) == 1:
                    rate = Interval(rate.value)  # one image says nothing of others
                metrics.append(metric(f"copies_at_factor_{factor}", subject, rate, len(near)))
    return metrics


def by_key(rows: list[dict[str, Any]]) -> Values:
    """What was measured, by model, factor, subject and metric, then by training seed."""
    values: Values = defaultdict(dict)
    for row in rows:
        key = (row["label"], row["factor"], row["subject"], row["metric"])
        # Of metrics with one name, such as differences to several references, the first counts.
        values[key].setdefault(row["training_seed"], Measured(row["value"], row["count"]))
    return dict(values)
