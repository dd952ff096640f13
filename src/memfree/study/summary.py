"""Summary of a study over seeds: rates, dose-response curves, effective memorization."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import expit
from scipy.stats import t as student_t

from memfree.evaluation.intervals import Interval, mean_interval
from memfree.evaluation.metrics import COPIES_OF_FACTOR, HELDOUT
from memfree.study.grid import LADDER, ORACLES, cell_title, without_size
from memfree.study.metrics_shown import RATIO, Measured, Values, geometric_over_seeds

LARGEST_SLOPE = 50.0
"""Logits a doubling beyond which the data are separated: no finite slope fits best."""
_STEPS = 100
_LARGEST_LOG = 500  # 2 to this power is no number any more


@dataclass(frozen=True)
class Point:
    """Copies among ``count`` samples of one dose, the copies of an image in the training set."""

    factor: float
    copies: float
    count: int
    seed: int = 0


@dataclass(frozen=True)
class Fit:
    """P(copy) = 1 / (1 + exp(−intercept − slope · log2 factor)), the mean over training seeds."""

    curves: np.ndarray
    """Intercept, in logits at a factor of 1, and slope of each training seed's own fit: (k, 2)."""
    slope: Interval
    """Logits a doubling of the factor, with Student's interval over seeds; none for one seed."""
    midpoint: Interval | None
    """Factor at which half of the samples are copies, the geometric mean over seeds; it may lie
    outside of what was measured. None where the data do not determine it: where the slope's
    interval has 0 in it, or the midpoint's no end that is a number."""

    @property
    def intercept(self) -> float:
        """Logits at a factor of 1, the mean over seeds."""
        return float(self.curves[:, 0].mean())

    def rate(self, factor: np.ndarray) -> np.ndarray:
        """The fitted share of copies at each factor: of the seeds' mean logit."""
        dose = np.log2(np.asarray(factor, float))
        return expit(self.intercept + self.slope.value * dose)

    def band(self, factor: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Ends of the fitted share's interval at each factor (t over seeds); None for one seed."""
        if len(self.curves) < 2:
            return None
        doses = np.log2(np.asarray(factor, float))
        each = [mean_interval(self.curves[:, 0] + self.curves[:, 1] * dose) for dose in doses]
        low, high = np.array([(one.low, one.high) for one in each], dtype=float).T
        return expit(low), expit(high)


def fit_logistic(points: Sequence[Point], level: float = 0.95) -> Fit | None:
    """Fit each training seed by maximum likelihood, and take the mean over seeds.

    None where a training seed has no finite best fit, so that no mean stands for all: one factor,
    no copies, nothing but copies, or factors that separate the two.
    """
    seeds = sorted({point.seed for point in points})
    fits = [_fit_seed([point for point in points if point.seed == seed]) for seed in seeds]
    finite = [fit for fit in fits if fit is not None]
    if not finite or len(finite) < len(fits):
        return None
    curves = np.array([beta for beta, _ in finite])
    slope = mean_interval(curves[:, 1], confidence=level)
    # Seeds may agree by chance on a curve that no training tells from a flat one.
    within = math.hypot(*(half for _, half in finite)) / len(finite)
    over = slope.low is None or slope.high is None or not slope.low <= 0 <= slope.high
    steep = over and abs(slope.value) > within
    return Fit(curves, slope, _midpoint(curves, level) if steep else None)


def _fit_seed(points: Sequence[Point]) -> tuple[np.ndarray, float] | None:
    """Intercept and slope (Newton's method), and half the slope's interval within this training.

    That interval, quasi-binomial (McCullagh and Nelder, 1989, 4.5), only tells a curve that is
    flat: it knows nothing of other trainings.
    """
    used = [point for point in points if point.count > 0]
    if len({point.factor for point in used}) < 2:
        return None
    x = np.stack([np.ones(len(used)), np.log2([point.factor for point in used])], 1)
    n = np.array([point.count for point in used], float)
    y = np.array([point.copies for point in used], float)
    if y.sum() in (0, n.sum()):
        return None
    beta = np.zeros(2)
    for _ in range(_STEPS):
        p = expit(x @ beta)
        information = x.T @ ((n * p * (1 - p))[:, None] * x)
        try:
            step = np.linalg.solve(information, x.T @ (y - n * p))
        except np.linalg.LinAlgError:
            return None
        # Steps of at most 2 logits a parameter: from 0 a full step may overshoot for good.
        beta = beta + step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-300))
        if abs(beta[1]) > LARGEST_SLOPE:
            return None
        if np.abs(step).max() < 1e-10:
            break
    else:
        return None
    p = expit(x @ beta)
    variance = n * p * (1 - p)
    freedom = len(y) - 2
    pearson = float(((y - n * p) ** 2 / np.maximum(variance, 1e-12)).sum())
    dispersion = max(1.0, pearson / freedom) if freedom else 1.0
    quantile = float(student_t.ppf(0.975, freedom if freedom else math.inf))
    covariance = dispersion * np.linalg.inv(x.T @ (variance[:, None] * x))
    return beta, quantile * math.sqrt(float(covariance[1, 1]))


def _midpoint(curves: np.ndarray, level: float) -> Interval | None:
    """Mean over seeds of the factors' logarithms at which the curves cross one half."""
    if not curves[:, 1].all():
        return None
    middle = mean_interval(-curves[:, 0] / curves[:, 1], confidence=level)
    if middle.low is None or middle.high is None:
        return None if abs(middle.value) > _LARGEST_LOG else Interval(2.0**middle.value)
    if max(abs(middle.low), abs(middle.high)) > _LARGEST_LOG:
        return None
    return Interval(2.0**middle.value, 2.0**middle.low, 2.0**middle.high)


MEMORIZED = 0.9
"""Share of copies from which on a training set counts as memorized (Gu et al., 2023)."""


@dataclass(frozen=True)
class Capacity:
    """The largest training set that is memorized, among those that were tried."""

    largest: int | None
    """Its images; None: no set that was tried is memorized."""
    tried: tuple[int, ...]
    """Sizes in ascending order."""
    crossing: float | None
    """Where the share falls to 90 %, on a line between ``largest`` and the next size in log2;
    None where one of the two is missing."""

    @property
    def text(self) -> str:
        """As tables show it."""
        if self.largest is None:
            return f"below {self.tried[0]}"
        return f"{'at least ' if self.largest == self.tried[-1] else ''}{self.largest}"


def effective_memorization(rates: Mapping[int, float], memorized: float = MEMORIZED) -> Capacity:
    """EMM of Gu et al., "On Memorization in Diffusion Models" (2023), definition 1.

    Args:
        rates: size of the training set to share of samples with d_1/d_2 < 1/3; at least one.
        memorized: share from which on a set is memorized.
    """
    tried = tuple(sorted(rates))
    largest = max((size for size in tried if rates[size] >= memorized), default=None)
    if largest is None or largest == tried[-1]:
        return Capacity(largest, tried, None)
    beyond = tried[tried.index(largest) + 1]
    share = (rates[largest] - memorized) / (rates[largest] - rates[beyond])
    crossing = math.log2(largest) + share * math.log2(beyond / largest)
    return Capacity(largest, tried, 2.0**crossing)


@dataclass(frozen=True)
class Capacities:
    """The capacity of each training seed's models, and how sure their mean is."""

    by_seed: Mapping[int, Capacity]
    """At least one."""

    @property
    def text(self) -> str:
        """As tables show it: one for all seeds where they agree, else each in order."""
        each = [capacity.text for _, capacity in sorted(self.by_seed.items())]
        return each[0] if len(set(each)) == 1 else ", ".join(each)

    @property
    def crossing(self) -> Interval | None:
        """Geometric mean of the seeds' crossings; None where one lies outside of what was tried."""
        each = [capacity.crossing for capacity in self.by_seed.values()]
        known = [crossing for crossing in each if crossing is not None]
        return geometric_over_seeds(known) if len(known) == len(each) else None


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
Curves = dict[Line, dict[int, dict[int, Measured]]]
"""By line, dose (a factor or a number of images, ascending) and training seed."""
_AT_FACTOR = "copies_at_factor_"


@dataclass(frozen=True)
class Summary:
    """Everything that a study found."""

    name: str
    values: Values
    rows: list[dict[str, Any]]
    """The same as ``values``, as rows of ``SCHEMA``."""
    missing: int
    """Cells that are not finished."""
    cells: int
    """All cells."""

    def doses(self) -> dict[Line, list[Point]]:
        """Copies by factor and training seed, of models that differ in these alone."""
        return _points(
            (model, subject, factor, by_seed)
            for (model, factor, subject, name), by_seed in self.values.items()
            if factor != LADDER and name == "copies"
        )

    def ladders(self) -> dict[Line, list[Point]]:
        """Copies by factor of models on a ladder: among the samples nearest to such an image."""
        return _points(
            (model, subject, int(name.removeprefix(_AT_FACTOR)), by_seed)
            for (model, factor, subject, name), by_seed in self.values.items()
            if factor == LADDER and name.startswith(_AT_FACTOR)
        )

    def fits(self) -> dict[Line, Fit | None]:
        """The logistic curve of each dose-response, None where none can be fitted."""
        lines = {**self.doses(), **self.ladders()}
        return {line: fit_logistic(points) for line, points in lines.items()}

    def per_image(self) -> Curves:
        """Copies of one image by its factor on a ladder, then by training seed."""
        curves: Curves = defaultdict(dict)
        for (model, factor, subject, name), by_seed in self.values.items():
            if factor == LADDER and name.startswith(COPIES_OF_FACTOR) and subject != HELDOUT:
                curves[model, subject][int(name.removeprefix(COPIES_OF_FACTOR))] = by_seed
        return {line: dict(sorted(curve.items())) for line, curve in curves.items()}

    def sizes(self) -> Curves:
        """Share with d_1/d_2 < 1/3 by number of training images, then by training seed."""
        curves: Curves = defaultdict(dict)
        for row in self.rows:
            if row["metric"] != RATIO or row["subject"] == HELDOUT or row["size"] is None:
                continue
            model = without_size(row["label"], row["size"])
            line = cell_title(model, row["factor"]), row["subject"]
            by_seed = curves[line].setdefault(row["size"], {})
            by_seed[row["training_seed"]] = Measured(row["value"], row["count"])
        return {
            line: dict(sorted(curve.items())) for line, curve in curves.items() if len(curve) > 1
        }

    def capacities(self) -> dict[Line, Capacities]:
        """Effective model memorization of each training seed's models."""
        capacities = {}
        for line, curve in self.sizes().items():
            rates: dict[int, dict[int, float]] = defaultdict(dict)
            for size, by_seed in curve.items():
                for seed, measured in by_seed.items():
                    rates[seed][size] = measured.value
            capacities[line] = Capacities(
                {seed: effective_memorization(known) for seed, known in rates.items()}
            )
        return capacities

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


def _points(
    measured: Iterable[tuple[str, str, int, dict[int, Measured]]],
) -> dict[Line, list[Point]]:
    """Points by line in the order of factors, of lines with several; no oracles, no test images."""
    lines: dict[Line, list[Point]] = defaultdict(list)
    for model, subject, factor, by_seed in measured:
        if subject != HELDOUT and subject not in ORACLES:
            lines[model, subject] += [
                Point(factor, one.value * one.count, one.count, seed)
                for seed, one in by_seed.items()
            ]
    return {
        line: sorted(points, key=lambda point: point.factor)
        for line, points in lines.items()
        if len({point.factor for point in points}) > 1
    }
