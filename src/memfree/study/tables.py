"""Tables of a study: means over training seeds, differences to the oracle, every interval."""

from __future__ import annotations

import math

from rich.table import Table

from memfree.evaluation.intervals import Interval
from memfree.study.statistics import (
    Measured,
    over_seeds,
    rate_over_seeds,
    upper_limit,
    upper_limit_of_rates,
)
from memfree.study.values import (
    DISTANCES,
    LADDER,
    MARGINS,
    ORACLES,
    RATES,
    SHOWN,
    Values,
    cells_of,
    subjects_of,
)


def as_markdown(values: Values) -> str:
    """All tables of a study: by metric, the differences to the oracle, and by cell."""
    tables = [by_metric(values), differences(values), by_cell(values)]
    return "\n".join(table for table in tables if table)


def by_metric(values: Values) -> str:
    """A table a metric: models down, subjects across, means; empty for a study of one model."""
    cells = cells_of(values)
    if len(cells) < 2:
        return ""
    # The cell with the most subjects has all of them, in their order.
    subjects = max((subjects_of(values, *cell) for cell in cells), key=len)
    parts = []
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
            parts.append(markdown_table(f"### {_capital(title)}", ["", *subjects], rows))
    return "\n".join(parts)


def differences(values: Values, subject: str = "both") -> str:
    """The goal of a mitigation: (subject − oracle), with its upper limit; empty without oracles."""
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
        return ""
    titles = [
        f"{SHOWN[metric].removesuffix(', %')}, {'%' if metric in DISTANCES else 'points'}, "
        f"≤ {100 * margin:+g}"
        for metric, margin in MARGINS.items()
    ]
    text = [
        f"### {subject} − oracle",
        "",
        "Mean difference over training seeds and, in parentheses, its one-sided 95 % upper limit:",
        "Student's t over seeds, for rates the larger of that and of Newcombe's limit for the",
        "pooled counts. Fréchet distances are relative to the oracle's. The goal stands above each",
        f"column; in bold: the limit is within it ({within} of {total}).",
    ]
    return markdown_table("\n".join(text), ["", "oracle at equal", *titles], rows)


def _mean_and_limit(metric: str, own: list[Measured], other: list[Measured]) -> tuple[float, float]:
    """Mean over seeds of own − other, and its one-sided 95 % upper limit.

    Rates are subtracted; distances are relative to the other's, and have no limit (NaN) with one
    seed.
    """
    pairs = list(zip(own, other, strict=True))
    if metric in DISTANCES:
        each = [a.value / b.value - 1 for a, b in pairs]
        limit = upper_limit(each)
    else:
        each = [a.value - b.value for a, b in pairs]
        limit = upper_limit_of_rates(own, other)
    return sum(each) / len(each), limit


def by_cell(values: Values) -> str:
    """A table a cell: subjects down, metrics across, means over seeds with 95 % intervals."""
    parts = []
    for conditioning, factor in cells_of(values):
        subjects = subjects_of(values, conditioning, factor)
        columns = [
            metric
            for metric in SHOWN
            if any((conditioning, factor, subject, metric) in values for subject in subjects)
        ]
        seeds = max(len(values[conditioning, factor, one, "copies"]) for one in subjects)
        rows = [
            [
                subject,
                *(_shown(values.get((conditioning, factor, subject, one)), one) for one in columns),
            ]
            for subject in subjects
        ]
        data = "a ladder of repetitions" if factor == LADDER else f"repeated images × {factor}"
        title = f"### {conditioning}, {data} (training seeds: {seeds})"
        parts.append(markdown_table(title, ["", *(SHOWN[one] for one in columns)], rows))
    return "\n".join(parts)


def printed(values: Values) -> Table:
    """The figures of all cells in one table for the terminal."""
    table = Table(title="Means over training seeds, 95 % intervals")
    for title in ("model", "subject", *SHOWN.values()):
        table.add_column(title)
    for cell in cells_of(values):
        for subject in subjects_of(values, *cell):
            shown = [_shown(values.get((*cell, subject, one)), one) for one in SHOWN]
            table.add_row(cell_title(*cell), subject, *shown)
    return table


def _interval(by_seed: dict[int, Measured], metric: str) -> Interval:
    """Mean over training seeds of a rate or a distance, with its 95 % interval, never below 0."""
    measured = list(by_seed.values())
    if metric in RATES:
        return rate_over_seeds(measured)
    found = over_seeds([one.value for one in measured])
    return Interval(found.value, found.low and max(found.low, 0.0), found.high)


def markdown_table(heading: str, titles: list[str], rows: list[list[str]]) -> str:
    """A heading, or text that begins with one, and a table below it."""
    lines = [heading, "", _line(titles), "|---" * len(titles) + "|", *map(_line, rows), ""]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def cell_title(model: str, factor: int) -> str:
    """A cell as it stands in tables."""
    return f"{model}, ladder" if factor == LADDER else f"{model} × {factor}"


def _capital(title: str) -> str:
    return title[0].upper() + title[1:]


def _difference_text(mean: float, limit: float, margin: float) -> str:
    if math.isnan(limit):
        return f"{100 * mean:+.2f} (one seed)"
    text = f"{100 * mean:+.2f} (≤ {100 * limit:+.2f})"
    return f"**{text}**" if limit <= margin else text


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
    found = _interval(by_seed, metric)
    scale = 100 if metric in RATES else 1
    if found.low is None or found.high is None:
        return f"{scale * found.value:.2f}"
    return f"{scale * found.value:.2f} ({scale * found.low:.2f}–{scale * found.high:.2f})"
