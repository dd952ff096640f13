"""Results of a text study: tables, detectors and plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from memfree.data.options import PromptSet
from memfree.evaluation.detectors import Detector, detector
from memfree.evaluation.intervals import Interval, shared_conditions
from memfree.evaluation.metrics import HELDOUT, Metric, read_metrics
from memfree.evaluation.plots import PRINTED_COLOURS
from memfree.folders.atomic import write_atomic, write_text
from memfree.folders.untrusted import read_table
from memfree.images import to_bytes
from memfree.sampling.sample_folder import SampleFolder
from memfree.study.page import ResultTable, figure_text

if TYPE_CHECKING:
    from memfree.evaluation.metrics import Metric

EARLY = (0, 3)
"""Numbers of the denoising steps after which σ_t is judged."""


@dataclass(frozen=True)
class Roc:
    """A score of unguided samples as a detector of those that end as copies by pixels."""

    title: str
    detector: Detector


def detectors(
    samples: Path, evaluation: Path, prompt_sets: Sequence[str], subject: str
) -> list[Roc]:
    """ROC curves over the samples of all prompt sets together, with intervals over captions.

    The truth is the verdict by pixels, which no score is made of. Scores: Wen's norm at the first
    step, and σ_t of the index early on.

    Args:
        samples: the study's sample folders by prompt set and subject; studies of other noise have
            others.
        evaluation: evaluations of these samples by prompt set.
        prompt_sets: which of them.
        subject: unguided samples, whose trace has ``wen_norm`` where that was recorded.

    Returns:
        One a score; none where no sample is a copy, or all are.
    """
    truth: list[np.ndarray] = []
    captions: list[str] = []
    scores: dict[str, list[np.ndarray]] = {}
    for prompts in prompt_sets:
        judged = read_table(evaluation / prompts / "pixels" / "per_sample.parquet")
        mine = judged.filter(pc.equal(judged["subject"], subject)).sort_by("sample")
        truth.append(mine["second_copy"].to_numpy(zero_copy_only=False).astype(bool))
        captions += mine["caption"].to_pylist() if "caption" in mine.column_names else []
        for title, values in _scores(samples / prompts / subject).items():
            scores.setdefault(title, []).append(values)
    copies = np.concatenate(truth)
    if copies.all() or not copies.any():
        return []
    clusters = shared_conditions(captions) if len(captions) == len(copies) else None
    return [
        Roc(title, detector(np.concatenate(parts), copies, clusters=clusters))
        for title, parts in scores.items()
        if len(parts) == len(prompt_sets)
    ]


def _scores(folder: Path) -> dict[str, np.ndarray]:
    """Scores (n,) by title, from the trace of a sample folder."""
    trace = pa.concat_tables([read_table(path) for path in sorted(folder.glob("trace-*"))])
    found = {}
    for step in EARLY:
        rows = trace.filter(pc.equal(trace["step"], step)).sort_by("sample")
        if step == 0 and "wen_norm" in rows.column_names:
            found["Wen's norm, step 1"] = rows["wen_norm"].to_numpy()
        found[f"σ_t, step {step + 1}"] = rows["sigma"].to_numpy()
    return found


HIGHLIGHTED = {
    "none": "#444444",
    "oracle": "#999999",
    "amg": PRINTED_COLOURS[1],
    "multiplicity": PRINTED_COLOURS[4],
    "both": PRINTED_COLOURS[2],
}
"""Colours of the subjects that the eye should find; the others are blue."""
PANELS = (
    ("duplicated", "frechet_efficientnet", "Fréchet distance, EfficientNet"),
    ("unseen", "clip_margin", "CLIP margin on unseen captions"),
)
"""Prompt set, metric and label of each panel's vertical axis."""

PICTURES_A_ROW = 10
"""Samples in a row of the picture."""


def write_rows(path: Path, folders: Mapping[str, Path]) -> None:
    """Write a PNG of the first samples, a row a subject; each column is from the same noise."""
    figure = Figure(figsize=(7, 0.62 * len(folders)), layout="constrained")
    grid = figure.subplots(len(folders), PICTURES_A_ROW, squeeze=False)
    for row, (subject, folder) in zip(grid, folders.items(), strict=True):
        images = next(iter(SampleFolder(folder).batches(PICTURES_A_ROW)))
        row[0].set_ylabel(subject, rotation=0, ha="right", va="center", fontsize=9)
        for axes in row:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for axes, image in zip(row, images, strict=False):
            # Without smoothing: these pixels are what was judged.
            pixels = to_bytes(image).permute(1, 2, 0).squeeze(2).numpy()
            axes.imshow(pixels, "gray", vmin=0, vmax=255, interpolation="nearest")
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))


def write_front(
    path: Path, found: Mapping[tuple[Any, str, str], Metric], subjects: Sequence[str]
) -> None:
    """Write a PNG: copies on repeated captions against quality, a dot a subject."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    for axes, (prompts, name, label) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for subject in subjects:
            copies = found.get(("duplicated", subject, "pixel_copies"))
            quality = found.get((prompts, subject, name))
            if copies is None or quality is None:
                continue
            colour = HIGHLIGHTED.get(subject, PRINTED_COLOURS[0])
            x = 100 * copies.value
            axes.plot([x], [quality.value], "o", color=colour, markersize=6)
            axes.annotate(
                subject,
                (x, quality.value),
                textcoords="offset points",
                xytext=(5, 4),
                fontsize=8,
                color=colour,
            )
        axes.set_xlabel("copies by pixels on captions of repeated images, %")
        axes.set_title(label, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))


def write_roc(path: Path, rocs: Sequence[Roc]) -> None:
    """Write a PNG with the ROC curve of each score."""
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, roc in enumerate(rocs):
        curve = roc.detector.roc
        axes.plot(
            curve["false_positive_rate"].to_numpy(),
            curve["true_positive_rate"].to_numpy(),
            color=PRINTED_COLOURS[number % len(PRINTED_COLOURS)],
            label=f"{roc.title} (AUC {roc.detector.auc.value:.3f})",
        )
    axes.plot([0, 1], [0, 1], ":", color="#bbbbbb")
    axes.set_xlabel("samples that are no copies, called copies")
    axes.set_ylabel("copies found")
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))


ORACLE = "oracle"
"""The same network trained on the images without repetitions."""
REFERENCE = "none"
"""Unguided samples, which the others are compared with where a study has them."""
PROMPTS: dict[PromptSet, str] = {
    "duplicated": "captions of the repeated images",
    "other": "captions of the other training images",
    "unseen": "captions of test images",
}
COLUMNS = {
    "copies": "copies, %",
    "pixel_copies": "by pixels, %",
    "embedding_copies": "by another embedding, %",
    "duplicated_share": "nearest is repeated, %",
    "frechet_efficientnet": "Fréchet, EfficientNet",
    "frechet_pixels": "Fréchet, pixels",
    "clip_margin": "CLIP margin",
    "clip_margin_difference": "… less that of {reference}",
    "seconds_per_sample": "s a sample",
}
"""Metrics of the tables and their titles, with the name of the reference."""

Found = dict[tuple[PromptSet, str, str], Metric]
"""Metric by prompt set, subject and name."""


def reference_of(subjects: Iterable[str]) -> str:
    """Whom the others are compared with: the unguided samples, without them the first subject."""
    named = list(subjects)
    return REFERENCE if REFERENCE in named else named[0]


def summarise_text(
    cell: Path,
    name: str,
    samples: Path,
    prompt_sets: Sequence[PromptSet],
    subjects: Sequence[str],
    console: Console,
) -> None:
    """Write NAME.csv, .parquet, .md and the plots from the finished evaluations of a study.

    Args:
        cell: folder of the studied model.
        name: the study.
        samples: its sample folders by prompt set and subject.
        prompt_sets: what was prompted with.
        subjects: in the order of the tables.
        console: where the tables are printed.
    """
    folder = cell / f"evaluation-{name}"
    found = gather_text(folder, prompt_sets)
    rows = [
        {
            "prompts": prompts,
            "subject": one.subject,
            "metric": metric,
            "value": float(one.value),
            "low": one.low,
            "high": one.high,
            "count": one.count,
        }
        for (prompts, _, metric), one in found.items()
    ]
    table = pa.Table.from_pylist(rows)
    write_atomic(cell / f"{name}.parquet", lambda path: pq.write_table(table, path))
    write_atomic(cell / f"{name}.csv", lambda path: pa_csv.write_csv(table, path))
    shown = [*subjects, HELDOUT]
    rocs = detectors(samples, folder, prompt_sets, REFERENCE) if REFERENCE in subjects else []
    alone = [prompts for prompts in prompt_sets if _has_one_caption(folder / prompts)]
    write_text(cell / f"{name}.md", as_markdown(found, shown, rocs, alone))
    write_front(cell / f"{name}.png", found, subjects)
    if rocs:
        write_roc(cell / f"{name}-detection.png", rocs)
    for prompts in prompt_sets:
        console.print(printed(found, prompts, shown))
    written = [".parquet", ".csv", ".md", ".png", *(["-detection.png"] if rocs else [])]
    line = f"Written: {cell / name}{', '.join(written)}"
    console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


def gather_text(folder: Path, prompt_sets: Sequence[PromptSet]) -> Found:
    """Metrics of the prompt sets; the second measure of either evaluation under its own name."""
    found: Found = {}
    for prompts in prompt_sets:
        for judge in ("pixels", "embedding"):
            for one in read_metrics(folder / prompts / judge / "metrics.json").metrics:
                second = one.metric == "second_copies"
                name = f"{judge.removesuffix('s')}_copies" if second else one.metric
                if second or judge == "pixels":
                    found.setdefault((prompts, one.subject, name), one)
    return found


def _has_one_caption(evaluation: Path) -> bool:
    """Whether all samples of a prompt set were asked for the same."""
    table = read_table(evaluation / "pixels" / "per_sample.parquet")
    return "caption" in table.column_names and len(pc.unique(table["caption"].drop_null())) == 1


def as_markdown(
    found: Found,
    subjects: Sequence[str],
    rocs: Sequence[Roc],
    alone: Sequence[PromptSet] = (),
) -> str:
    """A table a prompt set, with 95 % intervals; then how well copies are foreseen.

    Args:
        found: the metrics.
        subjects: in the order of the rows.
        rocs: of the scores that foresee copies.
        alone: prompt sets of one caption.
    """
    tables = []
    for prompts in dict.fromkeys(prompts for prompts, _, _ in found):
        columns = _columns(found, prompts, subjects)
        rows = [
            [subject, *(_shown(found.get((prompts, subject, one)), one) for one in columns)]
            for subject in subjects
        ]
        heading = f"{prompts.capitalize()}: {PROMPTS[prompts]}"
        text = _intervals_over(found, prompts)
        if prompts in alone:
            text = "One caption: 95 % intervals over its samples."
        tables.append(ResultTable(heading, ["", *columns.values()], rows, text))
    if rocs:
        rows = [
            [
                roc.title,
                figure_text(roc.detector.auc, ".3f"),
                f"{100 * roc.detector.true_positive_rate(0.01):.1f} %",
                f"{roc.detector.copies} of {roc.detector.copies + roc.detector.others}",
            ]
            for roc in rocs
        ]
        titles = ["score", "AUC", "found at 1 %", "copies"]
        text = "95 % intervals over captions, where several samples share one."
        tables.append(ResultTable("Foreseeing copies", titles, rows, text))
    return "\n".join(table.as_markdown() for table in tables)


def _intervals_over(found: Found, prompts: PromptSet) -> str:
    """What the intervals of a prompt set speak of: other captions, where samples share some."""
    captions = {
        one.detail["conditions"]
        for (of, _, _), one in found.items()
        if of == prompts and "conditions" in one.detail
    }
    if not captions:
        return "95 % intervals over samples: each has a caption of its own."
    return f"95 % intervals over captions, as samples share {max(captions)}: not over samples."


def printed(found: Found, prompts: PromptSet, subjects: Sequence[str]) -> Table:
    """The figures of one prompt set, to print."""
    columns = _columns(found, prompts, subjects)
    table = Table(title=f"{prompts}: {PROMPTS[prompts]}", title_justify="left")
    for title in ("", *columns.values()):
        table.add_column(title, justify="right" if title else "left")
    for subject in subjects:
        figures = (found.get((prompts, subject, one)) for one in columns)
        table.add_row(
            subject,
            *(_value(one, name) for one, name in zip(figures, columns, strict=True)),
        )
    return table


def _columns(found: Found, prompts: PromptSet, subjects: Sequence[str]) -> dict[str, str]:
    """The columns that someone has a figure in."""
    reference = reference_of(subjects)
    return {
        name: title.format(reference=reference)
        for name, title in COLUMNS.items()
        if any((prompts, subject, name) in found for subject in subjects)
    }


def _format(name: str) -> tuple[float, str]:
    """Factor and format of a metric's figures."""
    if name.endswith("copies") or name == "duplicated_share":
        return 100.0, ".1f"
    if name.startswith("frechet"):
        return 1.0, "#.3g"
    return 1.0, ".3f"


def _value(one: Metric | None, name: str) -> str:
    if one is None:
        return ""
    factor, form = _format(name)
    return figure_text(Interval(one.value), form, factor)


def _shown(one: Metric | None, name: str) -> str:
    """The figure with its interval in parentheses."""
    if one is None:
        return ""
    factor, form = _format(name)
    return figure_text(Interval(one.value, one.low, one.high), form, factor)
