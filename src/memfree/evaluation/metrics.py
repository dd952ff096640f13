"""Metrics and their table: values with intervals, written, read and printed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from memfree.console import shown
from memfree.evaluation.intervals import Interval
from memfree.folders.atomic import write_json
from memfree.folders.untrusted import read_json, short
from memfree.guidance.calibration import rate_text

HELDOUT = "heldout"
"""Subject of what is measured on the test images, as if they were samples."""
CHANGED = "changed"
"""Subject of training images changed on purpose: known copies, to see what a measure finds."""


@dataclass(frozen=True)
class Metric:
    """One number of one subject, as it stands in ``metrics.json``."""

    metric: str
    """Its name, for example ``copies`` or ``frechet_efficientnet``."""
    subject: str
    """Whose it is: a sample folder's name, or ``heldout``."""
    value: float
    """The number; rates are in [0, 1]."""
    low: float | None = None
    """Lower end of the 95 % interval, None where there is none."""
    high: float | None = None
    """Upper end of it."""
    count: int = 0
    """How many images it was measured on."""
    detail: dict[str, Any] = field(default_factory=dict)
    """What else the number depends on: extractor, threshold, false-positive rate, reference."""


def metric(
    name: str, subject: str, interval: Interval | float, count: int, **detail: Any
) -> Metric:
    """A ``Metric`` from an interval or a bare number."""
    if not isinstance(interval, Interval):
        interval = Interval(float(interval))
    return Metric(name, subject, interval.value, interval.low, interval.high, count, detail)


class MetricTable:
    """Metrics looked up by name and subject; the first of a pair wins."""

    def __init__(self, metrics: Iterable[Metric]):
        self.metrics = list(metrics)
        self._by_pair: dict[tuple[str, str], Metric] = {}
        for one in self.metrics:
            self._by_pair.setdefault((one.metric, one.subject), one)

    def get(self, name: str, subject: str) -> Metric | None:
        """The metric, None where it was not measured."""
        return self._by_pair.get((name, subject))

    def names(self) -> list[str]:
        """Names of the metrics, in the order of their first appearance."""
        return list(dict.fromkeys(one.metric for one in self.metrics))


def write_metrics(path: Path, metrics: Iterable[Metric]) -> None:
    """Write ``metrics.json`` atomically."""
    write_json(path, [asdict(one) for one in metrics])


def read_metrics(path: Path) -> MetricTable:
    """Read ``metrics.json``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a list of metrics.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no metrics at {path}; run `memfree evaluate` first")
    try:
        return MetricTable([_metric(entry) for entry in read_json(path)])
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{path} is not a list of metrics: {short(error)}") from error


def _metric(entry: Any) -> Metric:
    """One entry of ``metrics.json``; TypeError if it is something else."""
    one = Metric(**entry)
    for kind, values in (
        (str, (one.metric, one.subject)),
        ((int, float), (one.value, one.count)),
        ((int, float, NoneType), (one.low, one.high)),
        (dict, (one.detail,)),
    ):
        for value in values:
            if not isinstance(value, kind) or isinstance(value, bool):
                raise TypeError(f"{short(repr(value), 40)} in {short(repr(one.metric), 40)}")
    # JSON of others may write 1.0 as 1.
    low, high = (None if end is None else float(end) for end in (one.low, one.high))
    return replace(one, value=float(one.value), low=low, high=high)


COPIES_AT = "copies_at_"
"""Metrics of copies at another false-positive rate begin so, and end with the rate."""
COPIES_OF_FACTOR = "copies_per_image_of_factor_"
"""Metrics of copies of images with so many records begin so, and end with their number."""


def percent(value: float) -> str:
    """A rate as a percentage: 0.4715 as 47.2 %, a tiny one with another digit."""
    shown = 100 * value
    digits = 2 if 0 < abs(shown) < 0.95 else 1
    return f"{shown:.{digits}f} %".replace("-", "−") if value else "0 %"


def number(value: float) -> str:
    """About three significant digits, without exponent: 0.0123, 1.23, 12.3, 1234."""
    size = abs(value)
    if value == 0 or size < 5e-5:
        return "0"
    digits = next((d for limit, d in ((100, 0), (10, 1), (1, 2), (0.1, 3)) if size >= limit), 4)
    return f"{value:.{digits}f}".replace("-", "−")


def times(value: float) -> str:
    """A ratio: 18.4 ×, 0.82 ×."""
    return f"{value:.{1 if value >= 1 else 2}f} ×" if value else "0 ×"


def seconds(value: float) -> str:
    """A duration: 12 ms, 1.3 s."""
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.2f} s"


def memory(value: float) -> str:
    """Bytes as MB or GB."""
    return f"{value / 1e6:.0f} MB" if value < 1e9 else f"{value / 1e9:.2f} GB"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    metric: str
    label: str
    show: Callable[[float], str]
    note: str = ""
    """One sentence for a reader who has not met the metric."""
    section: str = "Memorization"
    """Heading that it stands under."""


QUALITY, PAPERS, COST = "Quality", "Figures that papers report", "Cost"
ROWS = (
    Row(
        "copies",
        "Copies",
        percent,
        "Nearer to a training image than all but the stated share of real held-out images.",
    ),
    Row(
        "second_copies",
        "Copies, second measure",
        percent,
        "By another similarity, calibrated by itself, that no guidance saw.",
    ),
    Row(
        "duplicated_share",
        "Nearest image is a duplicated one",
        percent,
        "How often the nearest training image is one that the training set repeats.",
    ),
    Row(
        "duplicated_share_ratio",
        "… over its fair share",
        times,
        "The fair share is that of test images at the samples' class mix.",
    ),
    Row(
        "same_image",
        "Copies still nearest to the same image",
        percent,
        "Of the noises that become a copy unguided; needs no threshold.",
    ),
    Row("same_image_chance", "… by chance", percent, "The same for other noises of the class."),
    Row(
        "frechet_efficientnet",
        "Fréchet distance, EfficientNet",
        number,
        "Distance of the distribution to the test images; held out: training against test images.",
        QUALITY,
    ),
    Row("frechet_pixels", "Fréchet distance, pixels", number, "The same on pixels.", QUALITY),
    Row("frechet_inception", "Fréchet distance, Inception", number, "FID as published.", QUALITY),
    Row(
        "kid_efficientnet",
        "KID, EfficientNet",
        number,
        "Kernel distance to the test images, unbiased in the number of images.",
        QUALITY,
    ),
    Row("kid_inception", "KID, Inception", number, "The same on Inception features.", QUALITY),
    Row(
        "precision_efficientnet",
        "Precision, EfficientNet",
        percent,
        "Share of the samples among real images (3 nearest neighbours, Kynkäänniemi et al.).",
        QUALITY,
    ),
    Row(
        "recall_efficientnet",
        "Recall, EfficientNet",
        percent,
        "Share of the test images among the samples.",
        QUALITY,
    ),
    Row(
        "vendi_efficientnet",
        "Vendi score, EfficientNet",
        number,
        "Effective number of different images; held out: of test images.",
        QUALITY,
    ),
    Row(
        "diversity_efficientnet",
        "Diversity, EfficientNet",
        number,
        "Mean of 1 − cosine over pairs; held out: of test images.",
        QUALITY,
    ),
    Row(
        "clip_score",
        "CLIP score",
        number,
        "Mean cosine of image and caption; held out: of test images and their captions.",
        QUALITY,
    ),
    Row(
        "clip_margin",
        "… above shuffled captions",
        number,
        "Less the score of the same images with captions of others.",
        QUALITY,
    ),
    Row(
        "class_agreement",
        "Shows the class asked for",
        percent,
        "By a classifier of the fit images; held out: its accuracy on test images.",
        QUALITY,
    ),
    Row("nl2_5th_percentile", "nL2, 5th percentile", number, "Normalized distance, eq. 8.", PAPERS),
    Row("nl2_minimum", "nL2, minimum", number, "The nearest sample of all.", PAPERS),
    Row(
        "nl2_below_1.4",
        "nL2 below 1.4",
        percent,
        "The paper's fixed threshold for CIFAR-10; it does not carry over to other data.",
        PAPERS,
    ),
    Row("nl2_below_1.6", "nL2 below 1.6", percent, "Its second one.", PAPERS),
    Row(
        "distance_ratio_below_third",
        "d₁/d₂ below 1/3",
        percent,
        "Three times nearer to the nearest than to the second nearest image (Gu et al.).",
        PAPERS,
    ),
    Row("active_share", "Steps steered by AMG", percent, "Over all steps and samples.", COST),
    Row(
        "seconds_per_sample",
        "Time a sample",
        seconds,
        "With the search that fills the trace.",
        COST,
    ),
    Row("peak_memory_bytes", "Peak memory", memory, "Of the process while it sampled.", COST),
)


def shown_rows(table: MetricTable) -> list[Row]:
    """The rows that this evaluation has, other false-positive rates after the main one."""
    rows: list[Row] = []
    measured = set(table.names())
    for row in ROWS:
        if row.metric in measured:
            rows.append(row)
        if row.metric == "copies":
            for name in table.names():
                if name.startswith(COPIES_AT):
                    rate = float(name.removeprefix(COPIES_AT))
                    label = f"Copies at {100 * rate:g} % false positives"
                    rows.append(Row(name, label, percent, "At a laxer threshold."))
    return rows


def interval_text(found: Metric, row: Row) -> str:
    """The 95 % interval in the row's unit, empty where there is none."""
    if found.low is None or found.high is None:
        return ""
    return f"{row.show(found.low).removesuffix(' %').removesuffix(' ×')} – {row.show(found.high)}"


LABEL_WIDTH, SUBJECT_WIDTH = 34, 16
"""Columns of the terminal that the metrics' labels and one subject's figures take, about."""


def print_table(table: MetricTable, subjects: Sequence[str], console: Console) -> None:
    """Print metrics by subject, intervals below the values.

    More subjects than the terminal is wide for are printed one table after another, held-out
    images in each.
    """
    drawn = [subject for subject in subjects if subject != HELDOUT]
    beside = [subject for subject in subjects if subject == HELDOUT]
    fit = max(1, (console.width - LABEL_WIDTH) // SUBJECT_WIDTH - len(beside))
    for start in range(0, len(drawn), fit):
        console.print(_table(table, [*drawn[start : start + fit], *beside]))


def _table(table: MetricTable, subjects: Sequence[str]) -> Table:
    """The figures of some subjects."""
    main = table.get("copies", subjects[0])
    rate = "" if main is None else f" ({false_positives(main)} false positives)"
    drawn = Table(title="Evaluation, with 95 % intervals", title_justify="left")
    drawn.add_column("metric")
    for subject in subjects:
        title = "held out" if subject == HELDOUT else subject
        drawn.add_column(Text(shown(title)), justify="right", no_wrap=True)
    rows = shown_rows(table)
    for place, row in enumerate(rows):
        cells = []
        for subject in subjects:
            found = table.get(row.metric, subject)
            interval = "" if found is None else interval_text(found, row)
            value = "" if found is None else row.show(found.value)
            cells.append(Text.assemble(value, (f"\n{interval}" if interval else "", "dim")))
        label = row.label + (rate if row.metric == "copies" else "")
        last = place + 1 == len(rows) or rows[place + 1].section != row.section
        drawn.add_row(label, *cells, end_section=last)
    return drawn


def false_positives(copies: Metric) -> str:
    """The threshold's false-positive rate, with its limits where the evaluation has them."""
    rate = copies.detail["false_positive_rate"]
    limits = copies.detail.get("false_positive_rate_limits")
    if isinstance(limits, list) and [type(end) for end in limits] == [float, float]:
        return rate_text(rate, limits)
    return f"{100 * rate:g} %"
