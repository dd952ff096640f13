"""Results of a study: gathered from its evaluations, over training seeds."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
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
from memfree.folders.untrusted import read_table
from memfree.study.curves import write_against_oracle, write_curves
from memfree.study.grid import LADDER, Cell, model_label
from memfree.study.metrics_shown import Measured, Values
from memfree.study.page import printed, write_report
from memfree.study.plan import Plan
from memfree.study.summary import SCHEMA, Summary


def summarise(plan: Plan, cells: Sequence[Cell], console: Console) -> Summary:
    """Gather the finished cells of a study: NAME.parquet, .csv, .md, .png and .html in ``out``.

    With an oracle at two factors or more also NAME-against-oracle.png.

    Args:
        plan: the study.
        cells: all that belong to it; those that are not finished are left out, and counted.
        console: where the table is printed.

    Raises:
        ValueError: nothing is finished yet.
    """
    rows = gather(plan, cells)
    if not rows:
        raise ValueError(f"{plan.out} has no finished evaluation of the study {plan.name}")
    to = plan.out / plan.name
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    write_atomic(to.with_suffix(".parquet"), lambda path: pq.write_table(table, path))
    write_atomic(to.with_suffix(".csv"), lambda path: pa_csv.write_csv(table, path))
    missing = len(cells) - len(finished(plan, cells))
    summary = Summary(plan.name, by_key(rows), rows, missing, len(cells))
    curves, oracle = f"{plan.name}.png", f"{plan.name}-against-oracle.png"
    pictures = {
        curves: write_curves(plan.out / curves, summary),
        oracle: write_against_oracle(plan.out / oracle, summary.values),
    }
    write_report(plan.out, summary, {name: shows for name, shows in pictures.items() if shows})
    console.print(printed(summary.values))
    if missing:
        console.print(f"{missing} of {len(cells)} cells are not finished and left out")
    written = [f"{to}.parquet, .csv, .html, and .md with intervals"]
    written += [str(plan.out / name) for name, shows in pictures.items() if shows]
    for line in written:
        console.print(
            f"Written: {line}", markup=False, emoji=False, highlight=False, soft_wrap=True
        )
    return summary


def finished(plan: Plan, cells: Sequence[Cell]) -> list[Cell]:
    """The cells that have figures."""
    return [cell for cell in cells if (plan.evaluation(cell) / "manifest.json").is_file()]


def gather(plan: Plan, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One row a cell, subject and metric, with the columns ``SCHEMA``.

    Args:
        plan: the study.
        cells: all that belong to it, whether finished or not.
    """
    rows: list[dict[str, Any]] = []
    ladders = {cell.factors for cell in cells if len(cell.factors) > 1}
    for cell in finished(plan, cells):
        evaluation = plan.evaluation(cell)
        folders = {
            subject: os.path.relpath(path, plan.out) for subject, path in plan.samples(cell).items()
        }
        label = model_label(cell, several_ladders=len(ladders) > 1)
        described = {
            "conditioning": cell.conditioning,
            "factor": cell.factors[0] if len(cell.factors) == 1 else LADDER,
            "ladder": " ".join(map(str, cell.factors)) if len(cell.factors) > 1 else None,
            "size": cell.size or None,
            "model": cell.model,
            "steps": cell.steps or plan.steps,
            "training_seed": cell.seed,
        }
        measured = read_metrics(evaluation / "metrics.json").metrics
        if len(cell.factors) > 1:
            measured = [*measured, *ladder_metrics(evaluation / "per_sample.parquet", cell.factors)]
        rows += [
            {
                **described,
                "subject": one.subject,
                "metric": one.metric,
                "value": float(one.value),
                "low": one.low,
                "high": one.high,
                "count": one.count,
                "label": label,
                "folder": folders.get(one.subject, os.path.relpath(evaluation, plan.out)),
            }
            for one in measured
        ]
    return rows


def ladder_metrics(per_sample: Path, factors: Sequence[int]) -> list[Metric]:
    """``copies_at_factor_F``: of the samples nearest to an image of F records, those that copy it.

    Unlike copies per image, it does not grow merely because the model draws a repeated image more
    often. Samples near one image resemble each other: intervals are over the images.

    Args:
        per_sample: of an evaluation.
        factors: of the ladder.
    """
    columns = {
        "subject": pa.string(),
        "nearest_multiplicity": pa.int64(),
        "nearest_key": pa.string(),
        "copy": pa.bool_(),
    }
    table = read_table(per_sample, columns)
    found = []
    for subject in pc.unique(table["subject"]).to_pylist():
        mine = table.filter(pc.equal(table["subject"], subject))
        for factor in factors:
            near = mine.filter(pc.equal(mine["nearest_multiplicity"], factor))
            if len(near):
                keys = near["nearest_key"].to_pylist()
                copies = near["copy"].to_numpy(zero_copy_only=False)
                rate = rate_interval(copies, shared_conditions(keys))
                if len(keys) > len(set(keys)) == 1:
                    rate = Interval(rate.value)  # one image says nothing of others
                found.append(metric(f"copies_at_factor_{factor}", subject, rate, len(near)))
    return found


def by_key(rows: list[dict[str, Any]]) -> Values:
    """What was measured, by model, factor, subject and metric, then by training seed."""
    values: Values = defaultdict(dict)
    for row in rows:
        key = (row["label"], row["factor"], row["subject"], row["metric"])
        # Of figures with one name, as differences to several references, the first counts.
        values[key].setdefault(row["training_seed"], Measured(row["value"], row["count"]))
    return dict(values)
