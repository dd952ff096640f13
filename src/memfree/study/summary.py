"""What a study comes to: its rows, and the curves through them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from memfree.evaluation.metrics import HELDOUT
from memfree.study.capacity import Capacities, effective_memorization
from memfree.study.labels import LADDER, cell_title, without_size
from memfree.study.logistic import Fit, Point, fit_logistic
from memfree.study.statistics import Measured
from memfree.study.values import ORACLES, RATIO, Values

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
Line = tuple[str, str]
"""Model and subject: what a curve is of."""
_AT_FACTOR = "copies_at_factor_"
_PER_IMAGE = "copies_per_image_of_factor_"


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

    def doses(self) -> dict[Line, list[Point]]:
        """Copies by factor and training seed, of models that differ in these alone."""
        found: dict[Line, list[Point]] = defaultdict(list)
        for (model, factor, subject, name), by_seed in self.values.items():
            if factor != LADDER and name == "copies" and _is_drawn(subject):
                found[model, subject] += _points(factor, by_seed)
        return _with_several_factors(found)

    def ladders(self) -> dict[Line, list[Point]]:
        """Copies by factor of models on a ladder: among the samples nearest to such an image."""
        found: dict[Line, list[Point]] = defaultdict(list)
        for (model, factor, subject, name), by_seed in self.values.items():
            if factor == LADDER and name.startswith(_AT_FACTOR) and _is_drawn(subject):
                found[model, subject] += _points(int(name.removeprefix(_AT_FACTOR)), by_seed)
        return _with_several_factors(found)

    def fits(self) -> dict[Line, Fit | None]:
        """The logistic curve of each dose-response, None where none can be fitted."""
        return {
            line: fit_logistic(points)
            for line, points in {**self.doses(), **self.ladders()}.items()
        }

    def per_image(self) -> dict[Line, dict[int, dict[int, Measured]]]:
        """Copies of one image by its factor on a ladder, then by training seed."""
        found: dict[Line, dict[int, dict[int, Measured]]] = defaultdict(dict)
        for (model, factor, subject, name), by_seed in self.values.items():
            if factor == LADDER and name.startswith(_PER_IMAGE) and subject != HELDOUT:
                found[model, subject][int(name.removeprefix(_PER_IMAGE))] = by_seed
        return {line: dict(sorted(of.items())) for line, of in found.items()}

    def sizes(self) -> dict[Line, dict[int, dict[int, Measured]]]:
        """Share with d_1/d_2 < 1/3 by number of training images, then by training seed."""
        found: dict[Line, dict[int, dict[int, Measured]]] = defaultdict(dict)
        for row in self.rows:
            if row["metric"] != RATIO or row["subject"] == HELDOUT or row["size"] is None:
                continue
            model = without_size(row["label"], row["size"])
            line = cell_title(model, row["factor"]), row["subject"]
            of = found[line].setdefault(row["size"], {})
            of[row["training_seed"]] = Measured(row["value"], row["count"])
        return {line: dict(sorted(of.items())) for line, of in found.items() if len(of) > 1}

    def capacities(self) -> dict[Line, Capacities]:
        """Effective model memorization of each training seed's models."""
        found = {}
        for line, of in self.sizes().items():
            rates: dict[int, dict[int, float]] = defaultdict(dict)
            for size, seeds in of.items():
                for seed, measured in seeds.items():
                    rates[seed][size] = measured.value
            found[line] = Capacities(
                {seed: effective_memorization(known) for seed, known in rates.items()}
            )
        return found

    @property
    def one_seed(self) -> bool:
        """Whether no model was trained with a second seed, so that there are no intervals."""
        return all(len(by_seed) == 1 for by_seed in self.values.values())


def rates_by_factor(points: Sequence[Point]) -> dict[float, list[Measured]]:
    """The share of copies of each point, by factor in ascending order."""
    return {
        factor: [Measured(p.copies / p.count, p.count) for p in points if p.factor == factor]
        for factor in sorted({point.factor for point in points})
    }


def _is_drawn(subject: str) -> bool:
    """Whether a subject's copies depend on the repetitions of its model's data."""
    return subject != HELDOUT and subject not in ORACLES


def _points(factor: int, by_seed: dict[int, Measured]) -> list[Point]:
    return [Point(factor, one.value * one.count, one.count, seed) for seed, one in by_seed.items()]


def _with_several_factors(found: dict[Line, list[Point]]) -> dict[Line, list[Point]]:
    return {
        line: sorted(points, key=lambda point: point.factor)
        for line, points in found.items()
        if len({point.factor for point in points}) > 1
    }
