"""Tables and page of a study."""

from __future__ import annotations

import base64
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from memfree.evaluation.intervals import Interval
from memfree.evaluation.page import template
from memfree.folders.atomic import write_text
from memfree.study.grid import LADDER, ORACLES, cell_title
from memfree.study.metrics_shown import (
    DISTANCES,
    MARGINS,
    RATES,
    RATIO,
    SHOWN,
    Key,
    Measured,
    Values,
    amount_over_seeds,
    cells_of,
    rate_over_seeds,
    subjects_of,
    upper_limit,
    upper_limit_of_rates,
)
from memfree.study.summary import MEMORIZED, Summary, rates_by_factor


class Bold(str):
    """The text of a number that meets its goal."""


@dataclass(frozen=True)
class ResultTable:
    """A table with its heading and a paragraph about it."""

    heading: str
    titles: Sequence[str]
    """Of the columns."""
    rows: Sequence[Sequence[str]]
    """As wide as ``titles``; :class:`Bold` where a number stands out."""
    text: str = ""

    def as_markdown(self) -> str:
        """The table below its heading, with an empty line at the end."""
        text = [textwrap.fill(self.text, 96), ""] if self.text else []
        rows = [
            [f"**{cell}**" if isinstance(cell, Bold) else cell for cell in r] for r in self.rows
        ]
        lines = [f"| {' | '.join(cells)} |" for cells in [self.titles, *rows]]
        lines.insert(1, "|---" * len(self.titles) + "|")
        return "\n".join([f"### {self.heading}", "", *text, *lines, ""])


def figure_text(number: Interval, form: str = ".3g", scale: float = 1.0) -> str:
    """A number times ``scale`` in Python's ``form``, with its interval in parentheses if any."""

    def formatted(value: float) -> str:
        return f"{scale * value:{form}}".rstrip(".")  # "#.3g" leaves a point behind three digits

    if number.low is None or number.high is None:
        return formatted(number.value)
    return f"{formatted(number.value)} ({formatted(number.low)}–{formatted(number.high)})"


def percent_text(rate: Interval) -> str:
    """A rate in per cent with its interval."""
    return figure_text(rate, ".1f", 100)


def mean_tables(values: Values) -> list[ResultTable]:
    """All tables of means: by metric, the differences to the oracle, and by cell."""
    return [*by_metric(values), *differences(values), *by_cell(values)]


def by_metric(values: Values) -> list[ResultTable]:
    """A table a metric: models down, subjects across, means; none for a study of one model."""
    cells = cells_of(values)
    if len(cells) < 2:
        return []
    # The cell with the most subjects has all of them, in their order.
    subjects = max((subjects_of(values, *cell) for cell in cells), key=len)
    tables = []
    for metric, title in SHOWN.items():
        rows = [
            [cell_title(*cell), *(_mean(values, (*cell, name, metric)) for name in subjects)]
            for cell in cells
            if any((*cell, name, metric) in values for name in subjects)
        ]
        if rows:
            tables.append(ResultTable(title[0].upper() + title[1:], ["", *subjects], rows))
    return tables


def differences(values: Values, subject: str = "both") -> list[ResultTable]:
    """The goal of a mitigation: (subject − oracle), with its upper limit; none without oracles."""
    rows, within, total = [], 0, 0
    for cell in cells_of(values):
        for oracle, equal in ORACLES.items():
            row = [cell_title(*cell), equal]
            for metric, margin in MARGINS.items():
                own = values.get((*cell, subject, metric), {})
                other = values.get((*cell, oracle, metric), {})
                seeds = sorted(own.keys() & other.keys())
                if not seeds:
                    row.append("")
                    continue
                mean, limit = _mean_and_limit(
                    metric, [own[seed] for seed in seeds], [other[seed] for seed in seeds]
                )
                within, total = within + (limit <= margin), total + (not math.isnan(limit))
                upper = "one seed" if math.isnan(limit) else f"≤ {100 * limit:+.2f}"
                text = f"{100 * mean:+.2f} ({upper})"
                row.append(Bold(text) if limit <= margin else text)
            if any(row[2:]):
                rows.append(row)
    if not rows:
        return []
    titles = [
        f"{SHOWN[metric].removesuffix(', %')}, {'%' if metric in DISTANCES else 'points'}, "
        f"≤ {100 * margin:+g}"
        for metric, margin in MARGINS.items()
    ]
    text = (
        "Mean difference over training seeds and, in parentheses, its one-sided 95 % upper limit: "
        "Student's t over seeds, for rates the larger of that and of Newcombe's limit for the "
        "pooled counts; none with one seed. Fréchet distances are relative to the oracle's. The "
        "goal stands above each "
        f"column; in bold: the limit is within it ({within} of {total})."
    )
    return [ResultTable(f"{subject} − oracle", ["", "oracle at equal", *titles], rows, text)]


def _mean_and_limit(metric: str, own: list[Measured], other: list[Measured]) -> tuple[float, float]:
    """Mean over seeds of own − other, and its one-sided 95 % upper limit, NaN for one seed.

    Rates are subtracted; distances are relative to the other's.
    """
    pairs = list(zip(own, other, strict=True))
    if metric in DISTANCES:
        each = [a.value / b.value - 1 for a, b in pairs]
        return sum(each) / len(each), upper_limit(each)
    each = [a.value - b.value for a, b in pairs]
    return sum(each) / len(each), upper_limit_of_rates(own, other)


def by_cell(values: Values) -> list[ResultTable]:
    """A table a cell: subjects down, metrics across, means over seeds with 95 % intervals."""
    tables = []
    for cell in cells_of(values):
        subjects = subjects_of(values, *cell)
        columns = [m for m in SHOWN if any((*cell, name, m) in values for name in subjects)]
        rows = [
            [name, *(_with_interval(values, (*cell, name, metric)) for metric in columns)]
            for name in subjects
        ]
        known = [(*cell, name, "copies") for name in subjects]
        seeds = max(len(values[key]) for key in known)
        how_many = f"training seeds: {seeds}" if seeds > 1 else "one training seed, no intervals"
        label, factor = cell
        title = label if factor == LADDER else f"{label}, repeated images × {factor}"
        titles = ["", *(SHOWN[metric] for metric in columns)]
        tables.append(ResultTable(f"{title} ({how_many})", titles, rows))
    return tables


def printed(values: Values) -> Table:
    """The means of all cells in one table for the terminal, which has no room for intervals."""
    known = [metric for metric in SHOWN if any(key[3] == metric for key in values)]
    table = Table(title="Means over training seeds", title_justify="left", box=SIMPLE, padding=0)
    table.add_column("model, subject")
    for metric in known:
        table.add_column(SHOWN[metric].replace(", ", ",\n"), justify="right")
    for cell in cells_of(values):
        table.add_row(Text(cell_title(*cell), style="bold"))
        for subject in subjects_of(values, *cell):
            means = [_mean(values, (*cell, subject, metric)) for metric in known]
            table.add_row(f"  {subject}", *means)
        table.add_section()
    return table


def _mean(values: Values, key: Key) -> str:
    """Mean over seeds: rates in per cent to a tenth, distances to three digits."""
    if not (by_seed := values.get(key)):
        return ""
    mean = sum(one.value for one in by_seed.values()) / len(by_seed)
    if key[-1] in RATES:
        return f"{100 * mean:.1f}"
    return f"{mean:#.3g}".rstrip(".") if mean < 999.5 else f"{mean:.0f}"


def _with_interval(values: Values, key: Key) -> str:
    if not (by_seed := values.get(key)):
        return ""
    measured = [*by_seed.values()]
    if key[-1] in RATES:
        return figure_text(rate_over_seeds(measured), ".2f", 100)
    return figure_text(amount_over_seeds(measured), ".2f")


def curve_tables(summary: Summary) -> list[ResultTable]:
    """Those of the tables that the study has rows for."""
    tables = [_ladders(summary), _fits(summary), _sizes(summary), _models(summary)]
    return [table for table in tables if table.rows]


def _ladders(summary: Summary) -> ResultTable:
    per_image = summary.per_image()
    rows = []
    for line, points in summary.ladders().items():
        for factor, measured in rates_by_factor(points).items():
            each = [*per_image.get(line, {}).get(int(factor), {}).values()]
            amount = figure_text(amount_over_seeds(each)) if each else ""
            near = str(sum(one.count for one in measured))
            rows.append(
                [*line, f"{factor:g}", amount, percent_text(rate_over_seeds(measured)), near]
            )
    return ResultTable(
        "Copies of an image against its repetitions",
        [
            *("model", "subject", "records", "copies an image"),
            *("copies of those near it, %", "samples near it"),
        ],
        rows,
        "Copies of one image among all samples of a model; and of the samples whose nearest "
        "training image has so many records, those that copy it.",
    )


def _fits(summary: Summary) -> ResultTable:
    rows = []
    for line, fit in summary.fits().items():
        shown = ["", "", ""]
        if fit is not None:
            middle = "" if fit.midpoint is None else figure_text(fit.midpoint)
            shown = [str(len(fit.curves)), figure_text(fit.slope), middle]
        rows.append([*line, *shown])
    return ResultTable(
        "Logistic fit in log2 of the factor",
        ["model", "subject", "training seeds", "logits a doubling", "factor of 50 % copies"],
        rows,
        "A fit a training seed: means over seeds with 95 % intervals (Student's t; the factor's in "
        "log2), which one seed has not. Empty where the curve of a seed has no finite best fit; "
        "without a factor of 50 % copies where the slope may be 0: the factor may not matter at "
        "all.",
    )


def _sizes(summary: Summary) -> ResultTable:
    capacities, percent = summary.capacities(), f"{100 * MEMORIZED:g} %"
    rows = []
    for line, curve in summary.sizes().items():
        capacity = capacities[line]
        crossing = "" if capacity.crossing is None else figure_text(capacity.crossing)
        shares = ", ".join(
            f"{size}: {percent_text(rate_over_seeds([*by_seed.values()]))}"
            for size, by_seed in curve.items()
        )
        rows.append([*line, str(len(capacity.by_seed)), capacity.text, crossing, shares])
    return ResultTable(
        "Effective model memorization",
        [
            *("model", "subject", "training seeds", "EMM, images"),
            *(f"images at {percent}", "share by images"),
        ],
        rows,
        f"The largest number of training images of which at least {percent} of the samples "
        "have d1/d2 < 1/3 (Gu et al., 2023), of each training seed where they differ; where the "
        "share crosses that between it and the next size; and the share at each size in %. Means "
        "over seeds with 95 % intervals (Student's t), which one seed has not.",
    )


def _models(summary: Summary) -> ResultTable:
    """Memorization by model, for studies that vary more than repetitions."""
    metrics = {"copies": "copies, %", RATIO: "d1/d2 < 1/3, %", "second_copies": "second measure, %"}
    varied = any(row["size"] or row["conditioning"].endswith("labels") for row in summary.rows)
    rows = []
    for cell in cells_of(summary.values) if varied else []:
        for subject in subjects_of(summary.values, *cell):
            known = [summary.values.get((*cell, subject, name)) for name in metrics]
            shown = [percent_text(rate_over_seeds([*one.values()])) if one else "" for one in known]
            rows.append([cell_title(*cell), subject, *shown])
    return ResultTable("Memorization by model", ["model", "subject", *metrics.values()], rows)


def as_markdown(summary: Summary) -> str:
    """All tables, the curves first."""
    notes = [f"{summary.missing} of {summary.cells} cells are not finished and left out.\n"]
    tables = [table.as_markdown() for table in _tables(summary)]
    return "\n".join([*(notes if summary.missing else []), *tables])


def _tables(summary: Summary) -> list[ResultTable]:
    return [*curve_tables(summary), *mean_tables(summary.values)]


def write_report(out: Path, summary: Summary, pictures: dict[str, str]) -> None:
    """Write ``out/NAME.md`` and ``out/NAME.html``, the same tables, of the curves first.

    The page needs no network, and holds no training images.

    Args:
        out: the study's folder.
        summary: what it found.
        pictures: names of PNG files in ``out``, and what each shows.
    """
    done = f"{summary.cells - summary.missing} of " if summary.missing else ""
    finished = " are finished" if summary.missing else ""
    folders: dict[tuple[str, str], str] = {}
    for row in summary.rows:
        cell = f"{cell_title(row['label'], row['factor'])}, seed {row['training_seed']}"
        folders[cell, row["subject"]] = row["folder"]
    page = template("report.html", "study").render(
        name=summary.name,
        lead=f"{done}{summary.cells} trained models{finished}.",
        pictures=[
            {"shows": shows, "data": base64.b64encode((out / name).read_bytes()).decode("ascii")}
            for name, shows in pictures.items()
        ],
        tables=_tables(summary),
        is_bold=lambda cell: isinstance(cell, Bold),
        folders=[(cell, subject, folder) for (cell, subject), folder in folders.items()],
    )
    write_text(out / f"{summary.name}.md", as_markdown(summary))
    write_text(out / f"{summary.name}.html", page)
