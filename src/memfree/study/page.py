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
from memfree.study.grid import LADDER, cell_title
from memfree.study.metrics_shown import (
    DISTANCES,
    MARGINS,
    ORACLES,
    RATES,
    RATIO,
    SHOWN,
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

_WIDTH = 96


class Bold(str):
    """The text of a figure that meets its goal."""


@dataclass(frozen=True)
class ResultTable:
    """A table with its heading and what there is to know about it."""

    heading: str
    titles: Sequence[str]
    """Of the columns."""
    rows: Sequence[Sequence[str]]
    """As wide as ``titles``; :class:`Bold` where a figure stands out."""
    text: str = ""
    """One paragraph."""

    def as_markdown(self) -> str:
        """The table below its heading, with an empty line at the end."""
        text = [textwrap.fill(self.text, _WIDTH), ""] if self.text else []
        rule = "|---" * len(self.titles) + "|"
        rows = [_line([*map(_markdown, row)]) for row in self.rows]
        return "\n".join([f"### {self.heading}", "", *text, _line(self.titles), rule, *rows, ""])


def figure_text(found: Interval, form: str = ".3g", scale: float = 1.0) -> str:
    """A figure with its interval in parentheses, where it has one.

    Args:
        found: the figure.
        form: a format of Python.
        scale: what it is multiplied by, 100 for per cent.
    """
    value = _formatted(scale * found.value, form)
    if found.low is None or found.high is None:
        return value
    low, high = (_formatted(scale * end, form) for end in (found.low, found.high))
    return f"{value} ({low}–{high})"


def percent_text(found: Interval) -> str:
    """A rate in per cent with its interval."""
    return figure_text(found, ".1f", 100)


def _formatted(value: float, form: str) -> str:
    return f"{value:{form}}".rstrip(".")  # "#.3g" leaves a point behind three digits


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown(cell: str) -> str:
    return f"**{cell}**" if isinstance(cell, Bold) else cell


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
        known = [cell for cell in cells if any((*cell, one, metric) in values for one in subjects)]
        rows = [
            [
                cell_title(*cell),
                *(_mean(values.get((*cell, one, metric)), metric) for one in subjects),
            ]
            for cell in known
        ]
        if rows:
            tables.append(ResultTable(_capital(title), ["", *subjects], rows))
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
                row.append(_difference_text(mean, limit, margin))
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
    """Mean over seeds of own − other, and its one-sided 95 % upper limit.

    Rates are subtracted; distances are relative to the other's. One seed has no limit (NaN).
    """
    pairs = list(zip(own, other, strict=True))
    if metric in DISTANCES:
        each = [a.value / b.value - 1 for a, b in pairs]
        limit = upper_limit(each)
    else:
        each = [a.value - b.value for a, b in pairs]
        limit = upper_limit_of_rates(own, other)
    return sum(each) / len(each), limit


def by_cell(values: Values) -> list[ResultTable]:
    """A table a cell: subjects down, metrics across, means over seeds with 95 % intervals."""
    tables = []
    for label, factor in cells_of(values):
        subjects = subjects_of(values, label, factor)
        columns = [
            metric
            for metric in SHOWN
            if any((label, factor, one, metric) in values for one in subjects)
        ]
        seeds = max(len(values[label, factor, one, "copies"]) for one in subjects)
        rows = [
            [subject, *(_shown(values.get((label, factor, subject, one)), one) for one in columns)]
            for subject in subjects
        ]
        title = label if factor == LADDER else f"{label}, repeated images × {factor}"
        how_many = f"training seeds: {seeds}" if seeds > 1 else "one training seed, no intervals"
        heading = f"{title} ({how_many})"
        tables.append(ResultTable(heading, ["", *(SHOWN[one] for one in columns)], rows))
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
            means = [_mean(values.get((*cell, subject, one)), one) for one in known]
            table.add_row(f"  {subject}", *means)
        table.add_section()
    return table


def _capital(title: str) -> str:
    return title[0].upper() + title[1:]


def _difference_text(mean: float, limit: float, margin: float) -> str:
    if math.isnan(limit):
        return f"{100 * mean:+.2f} (one seed)"
    text = f"{100 * mean:+.2f} (≤ {100 * limit:+.2f})"
    return Bold(text) if limit <= margin else text


def _mean(by_seed: dict[int, Measured] | None, metric: str) -> str:
    """Mean over seeds: rates in per cent to a tenth, distances to three digits."""
    if not by_seed:
        return ""
    mean = sum(one.value for one in by_seed.values()) / len(by_seed)
    if metric in RATES:
        return f"{100 * mean:.1f}"
    return f"{mean:#.3g}".rstrip(".") if mean < 999.5 else f"{mean:.0f}"


def _shown(by_seed: dict[int, Measured] | None, metric: str) -> str:
    """Mean over seeds with its interval in parentheses."""
    if not by_seed:
        return ""
    measured = list(by_seed.values())
    if metric in RATES:
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
            rows.append(
                [
                    *line,
                    f"{factor:g}",
                    figure_text(amount_over_seeds(each)) if each else "",
                    percent_text(rate_over_seeds(measured)),
                    str(sum(one.count for one in measured)),
                ]
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
    for line, of in summary.sizes().items():
        capacity = capacities[line]
        crossing = "" if capacity.crossing is None else figure_text(capacity.crossing)
        shares = ", ".join(
            f"{size}: {percent_text(rate_over_seeds([*seeds.values()]))}"
            for size, seeds in of.items()
        )
        seeds = str(len(capacity.by_seed))
        rows.append([*line, seeds, capacity.text, crossing, shares])
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
    metrics = {
        "copies": "copies, %",
        RATIO: "d1/d2 < 1/3, %",
        "second_copies": "second measure, %",
    }
    cells = cells_of(summary.values)
    varied = any(row["size"] or row["conditioning"].endswith("labels") for row in summary.rows)
    rows = []
    for cell in cells if varied else []:
        for subject in subjects_of(summary.values, *cell):
            found = [summary.values.get((*cell, subject, name)) for name in metrics]
            shown = [percent_text(rate_over_seeds([*one.values()])) if one else "" for one in found]
            rows.append([cell_title(*cell), subject, *shown])
    return ResultTable("Memorization by model", ["model", "subject", *metrics.values()], rows)


def write_report(out: Path, summary: Summary, pictures: dict[str, str]) -> None:
    """Write ``out/NAME.md`` and ``out/NAME.html``, the same tables, of the curves first.

    The page needs no network, and holds no training images.

    Args:
        out: the study's folder.
        summary: what it found.
        pictures: names of PNG files in ``out``, and what each shows.
    """
    write_text(out / f"{summary.name}.md", as_markdown(summary))
    write_text(out / f"{summary.name}.html", _page(out, summary, _tables(summary), pictures))


def as_markdown(summary: Summary) -> str:
    """All tables, the curves first."""
    tables, notes = _tables(summary), list[str]()
    if summary.missing:
        notes = [f"{summary.missing} of {summary.cells} cells are not finished and left out.\n"]
    return "\n".join([*notes, *(table.as_markdown() for table in tables)])


def _tables(summary: Summary) -> list[ResultTable]:
    return [*curve_tables(summary), *mean_tables(summary.values)]


def _page(
    out: Path, summary: Summary, tables: Sequence[ResultTable], pictures: dict[str, str]
) -> str:
    done = summary.cells - summary.missing
    folders = {
        (row["label"], row["factor"], row["training_seed"], row["subject"]): row["folder"]
        for row in summary.rows
    }
    return template("report.html", "study").render(
        name=summary.name,
        lead=f"{done} of {summary.cells} trained models are finished."
        if summary.missing
        else f"{summary.cells} trained models.",
        pictures=[
            {"shows": shows, "data": base64.b64encode((out / name).read_bytes()).decode("ascii")}
            for name, shows in pictures.items()
        ],
        tables=[
            {
                "heading": table.heading,
                "text": table.text,
                "titles": table.titles,
                "rows": [
                    [{"text": cell, "bold": isinstance(cell, Bold)} for cell in row]
                    for row in table.rows
                ],
            }
            for table in tables
        ],
        folders=[
            {
                "cell": f"{cell_title(label, factor)}, seed {seed}",
                "subject": subject,
                "folder": folder,
            }
            for (label, factor, seed, subject), folder in folders.items()
        ],
    )
