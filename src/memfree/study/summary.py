"""What a study comes to: its rows, the curves through them, and its tables."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from memfree.evaluation.intervals import Interval
from memfree.evaluation.metrics import HELDOUT
from memfree.study.capacity import MEMORIZED, Capacity, effective_memorization
from memfree.study.cells import DEFAULT_MODEL, Cell
from memfree.study.logistic import Fit, Point, fit_logistic
from memfree.study.statistics import Measured, over_seeds, rate_over_seeds
from memfree.study.tables import as_markdown, cell_title, markdown_table
from memfree.study.values import LADDER, ORACLES, Values, cells_of, subjects_of

SCHEMA = pa.schema(
    [
        ("conditioning", pa.string()),
        ("factor", pa.int64()),
        ("ladder", pa.string()),
        ("size", pa.int64()),
        ("model", pa.string()),
        ("steps", pa.int64()),
        ("training_seed", pa.int64()),
        ("subject", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("count", pa.int64()),
        ("label", pa.string()),
        ("folder", pa.string()),
    ]
)
"""Columns of a study's table. ``factor`` is 0 for a ladder, ``size`` null for all training images,
``folder`` the samples that were measured, or the evaluation, from the study's folder."""
RATIO = "distance_ratio_below_third"
Line = tuple[str, str]
"""Model and subject: what a curve is of."""


def model_label(cell: Cell) -> str:
    """A cell's conditioning and what else it has of its own, as it stands in tables."""
    parts = [cell.conditioning.replace("_", " ")]
    parts += [f"{cell.size} images"] if cell.size else []
    parts += [cell.model] if cell.model != DEFAULT_MODEL else []
    parts += [f"{cell.steps} steps"] if cell.steps else []
    return ", ".join(parts)


@dataclass(frozen=True)
class Summary:
    """Everything that a study found.

    Args:
        name: of the study.
        values: by model, factor, subject and metric, then by training seed.
        rows: the same as rows of ``SCHEMA``.
        missing: cells that are not finished.
        cells: all its cells.
    """

    name: str
    values: Values
    rows: list[dict[str, Any]]
    missing: int
    cells: int

    def as_markdown(self) -> str:
        """All tables: the curves first, then every figure with its interval."""
        notes = []
        if self.missing:
            notes = [f"{self.missing} of {self.cells} cells are not finished and left out.\n"]
        tables = [self._doses(), self._fits(), self._sizes(), self._models()]
        return "\n".join([*notes, *(one for one in tables if one), as_markdown(self.values)])

    def doses(self) -> dict[Line, list[Point]]:
        """Copies by factor, a point a factor and training seed, of each model and subject.

        Of a ladder: among the samples whose nearest image has that factor.
        """
        found: dict[Line, list[Point]] = defaultdict(list)
        for (model, factor, subject, name), by_seed in self.values.items():
            if subject == HELDOUT or subject in ORACLES:
                continue
            dose = None
            if factor == LADDER and name.startswith("copies_at_factor_"):
                dose = int(name.rsplit("_", 1)[1])
            elif factor != LADDER and name == "copies":
                dose = factor
            if dose is not None:
                of = f"{model}, ladder" if factor == LADDER else model
                found[of, subject] += [
                    Point(dose, one.value * one.count, one.count) for one in by_seed.values()
                ]
        return {
            line: sorted(points, key=lambda point: point.factor)
            for line, points in found.items()
            if len({point.factor for point in points}) > 1
        }

    def fits(self) -> dict[Line, Fit | None]:
        """The logistic curve of each dose-response, None where none can be fitted."""
        return {line: fit_logistic(points) for line, points in self.doses().items()}

    def per_image(self) -> dict[str, dict[int, dict[int, Interval]]]:
        """Copies of an image by its factor on a ladder: subject, factor, training seed."""
        found: dict[str, dict[int, dict[int, Interval]]] = {}
        prefix = "copies_per_image_of_factor_"
        for row in self.rows:
            if row["factor"] == LADDER and row["metric"].startswith(prefix):
                if row["subject"] == HELDOUT:
                    continue
                factor = int(row["metric"].removeprefix(prefix))
                interval = Interval(row["value"], row["low"], row["high"])
                of = found.setdefault(row["subject"], {}).setdefault(factor, {})
                of.setdefault(row["training_seed"], interval)
        return found

    def sizes(self) -> dict[Line, dict[int, dict[int, Measured]]]:
        """Share with d_1/d_2 < 1/3 by number of training images, then by training seed."""
        found: dict[Line, dict[int, dict[int, Measured]]] = defaultdict(dict)
        for row in self.rows:
            if row["metric"] != RATIO or row["subject"] == HELDOUT or row["size"] is None:
                continue
            model = row["label"].replace(f", {row['size']} images", "")
            line = cell_title(model, row["factor"]), row["subject"]
            of = found[line].setdefault(row["size"], {})
            of[row["training_seed"]] = Measured(row["value"], row["count"])
        return {line: dict(sorted(of.items())) for line, of in found.items() if len(of) > 1}

    def capacities(self) -> dict[Line, Capacity]:
        """Effective model memorization of the mean over training seeds."""
        return {
            line: effective_memorization(
                {size: rate_over_seeds([*seeds.values()]).value for size, seeds in of.items()}
            )
            for line, of in self.sizes().items()
        }

    def _doses(self) -> str:
        per_image = self.per_image()
        ladder = {line: points for line, points in self.doses().items() if "ladder" in line[0]}
        rows = []
        for (_, subject), points in ladder.items():
            for factor in sorted({point.factor for point in points}):
                at = [Measured(p.copies / p.count, p.count) for p in points if p.factor == factor]
                each = [one.value for one in per_image[subject][int(factor)].values()]
                rate = rate_over_seeds(at)
                nearest = sum(one.count for one in at)
                mean = interval_text(over_seeds(each))
                rows.append([subject, f"{factor:g}", mean, percent_text(rate), str(nearest)])
        if not rows:
            return ""
        text = [
            "### Copies of an image against its repetitions",
            "",
            "Copies of one image among all samples of a model; and of the samples whose nearest",
            "training image has so many records, those that copy it.",
        ]
        titles = ["", "records", "copies an image", "copies of those near it, %", "samples near it"]
        return markdown_table("\n".join(text), titles, rows)

    def _fits(self) -> str:
        rows = []
        for (model, subject), fit in self.fits().items():
            shown = ["", "", ""]
            if fit is not None:
                shown = [
                    interval_text(fit.slope),
                    "" if fit.midpoint is None else interval_text(fit.midpoint),
                    f"{fit.dispersion:.1f}",
                ]
            rows.append([model, subject, *shown])
        if not rows:
            return ""
        text = [
            "### Logistic fit in log2 of the factor",
            "",
            "95 % intervals, quasi-binomial: widened by the dispersion over factors and training",
            "seeds. Empty where no curve has a finite best fit; without a factor of 50 % copies",
            "where the interval of the slope has 0 in it: the factor may not matter at all.",
        ]
        titles = ["model", "subject", "logits a doubling", "factor of 50 % copies", "dispersion"]
        return markdown_table("\n".join(text), titles, rows)

    def _sizes(self) -> str:
        rows = []
        for (model, subject), of in self.sizes().items():
            capacity = self.capacities()[model, subject]
            crossing = "" if capacity.crossing is None else f"{capacity.crossing:.1f}"
            shares = ", ".join(
                f"{size}: {percent_text(rate_over_seeds([*seeds.values()]))}"
                for size, seeds in of.items()
            )
            rows.append([model, subject, capacity.text, crossing, shares])
        if not rows:
            return ""
        text = [
            "### Effective model memorization",
            "",
            f"The largest number of training images of which at least {100 * MEMORIZED:g} % of the",
            "samples have d1/d2 < 1/3 (Gu et al., 2023), where the share crosses that between it",
            "and the next size, and the share at each size in %.",
        ]
        titles = ["model", "subject", "EMM", "crossing", "share by images"]
        return markdown_table("\n".join(text), titles, rows)

    def _models(self) -> str:
        """Memorization by model, for studies that vary more than repetitions."""
        if not any(row["size"] or row["conditioning"].endswith("labels") for row in self.rows):
            return ""
        metrics = {
            "copies": "copies, %",
            RATIO: "d1/d2 < 1/3, %",
            "second_copies": "second measure, %",
        }
        rows = []
        for cell in cells_of(self.values):
            for subject in subjects_of(self.values, *cell):
                found = [self.values.get((*cell, subject, name), {}) for name in metrics]
                shown = [
                    percent_text(rate_over_seeds([*one.values()])) if one else "" for one in found
                ]
                rows.append([cell_title(*cell), subject, *shown])
        titles = ["model", "subject", *metrics.values()]
        return markdown_table("### Memorization by model", titles, rows)


def interval_text(found: Interval) -> str:
    """A figure to three digits with its interval."""
    if found.low is None or found.high is None:
        return f"{found.value:.3g}"
    return f"{found.value:.3g} ({found.low:.3g}–{found.high:.3g})"


def percent_text(found: Interval) -> str:
    """A rate in per cent with its interval."""
    assert found.low is not None and found.high is not None
    return f"{100 * found.value:.1f} ({100 * found.low:.1f}–{100 * found.high:.1f})"
