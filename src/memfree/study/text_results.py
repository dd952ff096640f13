"""Results of a text-to-image study: tables, detectors and plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from memfree.data.options import PromptSet
from memfree.evaluation.detectors import Detector, detector
from memfree.evaluation.intervals import Interval, shared_conditions
from memfree.evaluation.metrics import HELDOUT, Metric, read_metrics
from memfree.evaluation.plots import PRINTED_COLOURS
from memfree.folders.atomic import write_text
from memfree.folders.manifest import save_config, write_manifest
from memfree.folders.untrusted import read_table
from memfree.images import to_bytes
from memfree.sampling.sample_folder import SampleFolder
from memfree.study.curves import save, title
from memfree.study.page import ResultTable, figure_text
from memfree.study.results import metric_rows, say_written, write_rows
from memfree.study.text_plan import ORACLE, REFERENCE, TextPlan, reference_of

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


def summarise(plan: TextPlan, console: Console) -> None:
    """Write NAME.csv, .parquet, .md and the pictures of the finished prompt sets; print the tables.

    Raises:
        ValueError: nothing is finished yet.
    """
    sets, subjects = [cell for cell in plan.cells() if plan.evaluated(cell)], [*plan.everyone()]
    if not sets:
        raise ValueError(f"{plan.folder} has no finished evaluation of the study {plan.name}")
    to, shown = plan.folder / plan.name, [*subjects, HELDOUT]
    found = gather(plan.evaluation, sets)
    write_pictures(
        Path(f"{to}-rows.png"), {subject: plan.samples(sets[0], subject) for subject in subjects}
    )
    rows: list[dict[str, Any]] = []
    for (prompts, _, name), one in found.items():
        (row,) = metric_rows({"prompts": prompts}, [one])
        rows.append({**row, "metric": name})
    write_rows(to, rows)
    rocs = detectors(plan, sets) if REFERENCE in subjects else []
    alone = [prompts for prompts in sets if _has_one_caption(plan.evaluations(prompts)[0])]
    write_text(Path(f"{to}.md"), as_markdown(found, shown, rocs, alone))
    write_front(Path(f"{to}.png"), found, subjects)
    if rocs:
        write_roc(Path(f"{to}-detection.png"), rocs)
    for prompts in sets:
        console.print(printed(found, prompts, shown))
    detection = ", -detection.png" if rocs else ""
    say_written(console, f"{to}.parquet, .csv, .md, .png{detection}, -rows.png")
    save_config(plan.evaluation)
    write_manifest(
        plan.evaluation, "study", plan.noise_seed, name=plan.name, subjects=plan.subjects
    )


def gather(evaluation: Path, prompt_sets: Sequence[PromptSet]) -> Found:
    """Metrics of the prompt sets; the second measure of either evaluation under its own name."""
    found: Found = {}
    for prompts in prompt_sets:
        for judge in ("pixels", "embedding"):
            for one in read_metrics(evaluation / prompts / judge / "metrics.json").metrics:
                second = one.metric == "second_copies"
                name = f"{judge.removesuffix('s')}_copies" if second else one.metric
                if second or judge == "pixels":
                    found.setdefault((prompts, one.subject, name), one)
    return found


def _has_one_caption(evaluation: Path) -> bool:
    """Whether all samples of a prompt set have the same caption."""
    table = read_table(evaluation / "per_sample.parquet")
    return "caption" in table.column_names and len(pc.unique(table["caption"].drop_null())) == 1


EARLY = (0, 3)
"""Numbers of the denoising steps after which σ_t is judged."""


@dataclass(frozen=True)
class Roc:
    """A score of unguided samples as a detector of those that end as copies by pixels."""

    title: str
    detector: Detector


def detectors(plan: TextPlan, prompt_sets: Sequence[PromptSet]) -> list[Roc]:
    """ROC curves over the unguided samples of all prompt sets, with intervals over captions.

    The truth is the verdict by pixels, which no score is made of. Scores: Wen's norm at the first
    step, where the trace has it, and σ_t of the index early on.

    Returns:
        One a score; none where no sample is a copy, or all are.
    """
    truth: list[np.ndarray] = []
    captions: list[str] = []
    scores: dict[str, list[np.ndarray]] = {}
    for prompts in prompt_sets:
        judged = read_table(plan.evaluations(prompts)[0] / "per_sample.parquet")
        own = judged.filter(pc.equal(judged["subject"], REFERENCE)).sort_by("sample")
        truth.append(own["second_copy"].to_numpy(zero_copy_only=False).astype(bool))
        captions += own["caption"].to_pylist() if "caption" in own.column_names else []
        for name, values in _scores(plan.samples(prompts, REFERENCE)).items():
            scores.setdefault(name, []).append(values)
    copies = np.concatenate(truth)
    if copies.all() or not copies.any():
        return []
    clusters = shared_conditions(captions) if len(captions) == len(copies) else None
    return [
        Roc(name, detector(np.concatenate(parts), copies, clusters=clusters))
        for name, parts in scores.items()
        if len(parts) == len(prompt_sets)
    ]


def _scores(folder: Path) -> dict[str, np.ndarray]:
    """Scores (n,) by title, from the trace of a sample folder."""
    trace = pa.concat_tables([read_table(path) for path in sorted(folder.glob("trace-*"))])
    scores = {}
    for step in EARLY:
        rows = trace.filter(pc.equal(trace["step"], step)).sort_by("sample")
        if step == 0 and "wen_norm" in rows.column_names:
            scores["Wen's norm, step 1"] = rows["wen_norm"].to_numpy()
        scores[f"σ_t, step {step + 1}"] = rows["sigma"].to_numpy()
    return scores


def as_markdown(
    found: Found, subjects: Sequence[str], rocs: Sequence[Roc], alone: Sequence[PromptSet] = ()
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
        titles, rows = _table(found, prompts, subjects, _with_interval)
        heading = f"{prompts.capitalize()}: {PROMPTS[prompts]}"
        text = _intervals_over(found, prompts)
        if prompts in alone:
            text = "One caption: 95 % intervals over its samples."
        tables.append(ResultTable(heading, titles, rows, text))
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
    """What the intervals of a prompt set are over: captions, where samples share some."""
    captions = {
        one.detail["conditions"]
        for (of, _, _), one in found.items()
        if of == prompts and "conditions" in one.detail
    }
    if not captions:
        return "95 % intervals over samples: each has a caption of its own."
    return f"95 % intervals over captions, as samples share {max(captions)}: not over samples."


def printed(found: Found, prompts: PromptSet, subjects: Sequence[str]) -> Table:
    """The numbers of one prompt set, to print."""
    titles, rows = _table(found, prompts, subjects, lambda one: Interval(one.value))
    table = Table(title=f"{prompts}: {PROMPTS[prompts]}", title_justify="left")
    for text in titles:
        table.add_column(text, justify="right" if text else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _with_interval(one: Metric) -> Interval:
    return Interval(one.value, one.low, one.high)


def _table(
    found: Found, prompts: PromptSet, subjects: Sequence[str], shown: Callable[[Metric], Interval]
) -> tuple[list[str], list[list[str]]]:
    """Titles and rows: a row a subject, of the metrics that one of them has."""
    reference = reference_of(subjects)
    columns = {
        name: text.format(reference=reference)
        for name, text in COLUMNS.items()
        if any((prompts, subject, name) in found for subject in subjects)
    }
    rows = []
    for subject in subjects:
        metrics = {name: found.get((prompts, subject, name)) for name in columns}
        texts = (
            figure_text(shown(one), *_form(name)) if one else "" for name, one in metrics.items()
        )
        rows.append([subject, *texts])
    return ["", *columns.values()], rows


def _form(name: str) -> tuple[str, float]:
    """Format and factor of a metric's numbers."""
    if name.endswith("copies") or name == "duplicated_share":
        return ".1f", 100.0
    return ("#.3g" if name.startswith("frechet") else ".3f"), 1.0


HIGHLIGHTED = {
    REFERENCE: "#444444",
    ORACLE: "#999999",
    "amg": PRINTED_COLOURS[1],
    "multiplicity": PRINTED_COLOURS[4],
    "both": PRINTED_COLOURS[2],
}
"""Colours of the subjects that the eye should find; the others are red."""
PANELS = (
    ("duplicated", "frechet_efficientnet", "Fréchet distance, EfficientNet"),
    ("unseen", "clip_margin", "CLIP margin on unseen captions"),
)
"""Prompt set, metric and label of each panel's vertical axis."""
PICTURES_A_ROW = 10


def write_pictures(path: Path, folders: Mapping[str, Path]) -> None:
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
    save(figure, path)


def write_front(path: Path, found: Found, subjects: Sequence[str]) -> None:
    """Write a PNG: copies on repeated captions against quality, a dot a subject."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    for axes, (prompts, name, label) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for subject in subjects:
            copies = found.get(("duplicated", subject, "pixel_copies"))
            quality = found.get((prompts, subject, name))  # type: ignore[arg-type]
            if copies is None or quality is None:
                continue
            colour = HIGHLIGHTED.get(subject, PRINTED_COLOURS[0])
            place = (100 * copies.value, quality.value)
            axes.plot(*([each] for each in place), "o", color=colour, markersize=6)
            axes.annotate(
                subject,
                place,
                textcoords="offset points",
                xytext=(5, 4),
                fontsize=8,
                color=colour,
            )
        axes.set_xlabel("copies by pixels on captions of repeated images, %")
        title(axes, label)
    save(figure, path)


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
    save(figure, path)
