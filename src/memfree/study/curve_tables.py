"""Tables of what a study varied: repetitions, the number of images, what the network is told."""

from __future__ import annotations

from memfree.study.capacity import MEMORIZED
from memfree.study.labels import cell_title
from memfree.study.statistics import amount_over_seeds, rate_over_seeds
from memfree.study.summary import Summary, rates_by_factor
from memfree.study.table import ResultTable, figure_text, percent_text
from memfree.study.values import RATIO, cells_of, subjects_of


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
