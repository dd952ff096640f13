"""Summary of a study over seeds: rates, dose-response curves, effective memorization."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import expit
from scipy.stats import t as student_t

from memfree.evaluation.intervals import Interval, mean_interval
from memfree.evaluation.metrics import HELDOUT
from memfree.study.grid import LADDER, cell_title, without_size
from memfree.study.metrics_shown import ORACLES, RATIO, Measured, Values, geometric_over_seeds

LARGEST_SLOPE = 50.0
"""Logits a doubling beyond which the data are separated: no finite slope fits best."""
_STEPS = 100
_LARGEST_LOG = 500  # 2 to this power is no number any more


@dataclass(frozen=True)
class Point:
    """Copies among the samples of one dose."""

    factor: float
    """Records of the repeated images."""
    copies: float
    count: int
    """Samples."""
    seed: int = 0
    """Training seed."""


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
        dose = np.log2(np.asarray(factor, float))
        each = [mean_interval(self.curves[:, 0] + self.curves[:, 1] * one) for one in dose.ravel()]
        if any(one.low is None for one in each):
            return None
        low, high = (
            expit(np.array(ends, dtype=float)).reshape(dose.shape)
            for ends in ([one.low for one in each], [one.high for one in each])
        )
        return low, high


def fit_logistic(points: Sequence[Point], level: float = 0.95) -> Fit | None:
    """Fit each training seed by maximum likelihood, and take the mean over seeds.

    Args:
        points: one a factor and training seed.
        level: two-sided.

    Returns:
        None where a training seed has no finite best fit, so that no mean stands for all: one
        factor, no copies, nothing but copies, or factors that separate the two.
    """
    seeds = sorted({point.seed for point in points})
    fits = [_fit_seed([point for point in points if point.seed == seed]) for seed in seeds]
    found = [fit for fit in fits if fit is not None]
    if not found or len(found) < len(fits):
        return None
    curves = np.array([beta for beta, _ in found])
    slope = mean_interval(curves[:, 1], confidence=level)
    # Seeds may agree by chance on a curve that no training tells from a flat one.
    within = math.hypot(*(half for _, half in found)) / len(found)
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
    ends = [middle.value if end is None else end for end in (middle.low, middle.high)]
    if max(map(abs, ends)) > _LARGEST_LOG:
        return None
    if middle.low is None or middle.high is None:
        return Interval(2.0**middle.value)
    return Interval(2.0**middle.value, 2.0**middle.low, 2.0**middle.high)


MEMORIZED = 0.9
"""Share of copies from which on a training set counts as memorized (Gu et al., 2023)."""


@dataclass(frozen=True)
class Capacity:
    """The largest training set that is memorized, among those that were tried."""

    largest: int | None
    """Images of it; None: no set that was tried is memorized."""
    tried: tuple[int, ...]
    """Sizes in ascending order."""
    crossing: float | None
    """Where the share falls to 90 %, on a line between ``largest`` and the next size in log2;
    None where one of the two is missing."""

    @property
    def text(self) -> str:
        """As it stands in a table."""
        if self.largest is None:
            return f"below {self.tried[0]}"
        if self.largest == self.tried[-1]:
            return f"at least {self.largest}"
        return str(self.largest)


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
        """As it stands in a table: one for all seeds where they agree, else each in order."""
        each = [capacity.text for _, capacity in sorted(self.by_seed.items())]
        return each[0] if len(set(each)) == 1 else ", ".join(each)

    @property
    def crossing(self) -> Interval | None:
        """Geometric mean of the seeds' crossings with Student's interval, which one seed has not.

        None where a seed has no crossing: it lies outside of what was tried.
        """
        each = [capacity.crossing for capacity in self.by_seed.values()]
        known = [one for one in each if one is not None]
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
