"""What a study measured: gathered from its evaluations, summarised over training seeds."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from rich.console import Console

from memfree.evaluation.metrics import read_metrics
from memfree.manifest import write_atomic, write_text
from memfree.study.statistics import Measured
from memfree.study.tables import as_markdown, printed
from memfree.study.values import Values

_CELL = re.compile(r"(?P<conditioning>[a-z]+)-x(?P<factor>\d+)-seed(?P<seed>\d+)")


def summarise_old(out: Path, name: str, cells: Container[str], console: Console) -> Values:
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
    write_text(out / f"{name}.md", as_markdown(values))
    console.print(printed(values))
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


def summarise(plan: Any, cells: Any, console: Console) -> None:
    """Not yet."""
