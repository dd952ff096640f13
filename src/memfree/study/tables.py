"""Tables of a study's means: over training seeds, with intervals, and less those of the oracle."""

from __future__ import annotations

import math

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from memfree.study.labels import LADDER, cell_title
from memfree.study.statistics import (
    Measured,
    amount_over_seeds,
    rate_over_seeds,
    upper_limit,
    upper_limit_of_rates,
)
from memfree.study.table import Bold, ResultTable, figure_text
from memfree.study.values import (
    DISTANCES,
    MARGINS,
    ORACLES,
    RATES,
    SHOWN,
    Values,
    cells_of,
    subjects_of,
)


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
