"""Plots of a report, in matplotlib: SVG for dark and light pages, and a picture for a README."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from memfree.evaluation.folder import EvaluationFolder
from memfree.evaluation.metrics import COPIES_OF_FACTOR, MetricTable
from memfree.images import open_image

# Stand-ins that the SVG is drawn with, each replaced by a variable of the page's style sheet.
INK, MUTED, RULE, HELD = "#010203", "#040506", "#070809", "#0a0b0c"
SERIES = ("#101010", "#111111", "#121212", "#131313", "#141414", "#151515")
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    HELD: "var(--held)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)},
}
PRINTED_COLOURS = ("#c2412d", "#2b6cb0", "#1d7a5f", "#7d55b0", "#a06c0a", "#b23a77")
"""The page's series colours in its light form, for pictures outside of it."""
BAD, GOOD, BLACK, GREY, PAPER = "#c2412d", "#1d7a5f", "#1d1d1f", "#66666e", "#ffffff"
SMALL_IMAGE = 64
"""Images of fewer pixels per side are shown as squares and not smoothed."""
MAX_COLUMNS = 8
"""Samples in the picture for a README."""
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "grid.alpha": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}


def series_colours(subjects: Sequence[str]) -> dict[str, str]:
    """A colour for each subject, in order; the held-out images have one of their own."""
    return {name: SERIES[i % len(SERIES)] for i, name in enumerate(subjects)}


def css_colours(subjects: Sequence[str]) -> dict[str, str]:
    """The same colours, as the page's style sheet names them."""
    return {name: _VARIABLES[colour] for name, colour in series_colours(subjects).items()}


def trajectory_chart(
    rows: Sequence[dict[str, Any]], subjects: Sequence[str], reference: str
) -> str | None:
    """σ_t against λ_t, a panel per subject: noise that became a copy unguided, and the rest.

    Args:
        rows: of ``trajectories.parquet``.
        subjects: panels, in order.
        reference: the subject whose copies define the groups.

    Returns:
        SVG, None if no subject has a trace.
    """
    traced = [name for name in subjects if any(row["subject"] == name for row in rows)]
    if not traced:
        return None
    colours = series_colours(subjects)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 3.3), layout="constrained")
        panels = figure.subplots(1, len(traced), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, traced, strict=True):
            _trajectory_panel(axes, [r for r in rows if r["subject"] == name], colours[name])
            same = "" if name == reference else ", same noise"
            axes.set_title(f"{name}{same}")
        panels[0].set_ylabel("similarity σ$_t$ (higher is nearer)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
        return _svg(figure, "trajectory")


def _trajectory_panel(axes: Any, rows: Sequence[dict[str, Any]], colour: str) -> None:
    for group, shade, label in (
        ("others", HELD, "noise that becomes no copy"),
        ("copies", colour, "noise that becomes a copy unguided"),
    ):
        part = [row for row in rows if row["group"] == group]
        if not part:
            continue
        t, low, lower, middle, upper, high = (
            np.array([row[name] for row in part])
            for name in ("t", "q10", "q25", "q50", "q75", "q90")
        )
        axes.fill_between(t, low, high, color=shade, alpha=0.13, linewidth=0)
        axes.fill_between(t, lower, upper, color=shade, alpha=0.22, linewidth=0)
        axes.plot(t, middle, color=shade, linewidth=1.8, label=label)
    limit = sorted({(row["t"], row["lambda"]) for row in rows if row["lambda"] is not None})
    if limit:
        style = {"color": INK, "linewidth": 1.2, "linestyle": (0, (4, 3))}
        axes.plot(*zip(*limit, strict=True), **style, label="threshold λ$_t$")
    axes.invert_xaxis()
    axes.set_xlabel("timestep t")


def dose_chart(table: MetricTable, subjects: Sequence[str]) -> str | None:
    """Copies per image and 1000 samples, by duplication factor, with Wilson's intervals.

    Returns:
        SVG, None if there are no factors.
    """
    prefix = COPIES_OF_FACTOR
    factors = sorted(
        {int(name.removeprefix(prefix)) for name in table.names() if name.startswith(prefix)}
    )
    if not factors:
        return None
    colours = series_colours(subjects)
    width = 0.8 / len(subjects)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.7, 3.3), layout="constrained")
        axes = figure.subplots()
        for place, name in enumerate(subjects):
            for x, factor in enumerate(factors):
                found = table.get(f"{prefix}{factor}", name)
                if found is None or found.low is None or found.high is None:
                    continue
                scale = 1000 / found.count
                middle = x + (place - (len(subjects) - 1) / 2) * width
                value = found.value * scale
                bar = axes.bar(middle, value, width * 0.86, color=colours[name], alpha=0.85)
                if x == 0:
                    bar.set_label(name)
                ends = _error_bar(value, found.low * scale, found.high * scale)
                axes.errorbar(middle, value, ends, color=INK, linewidth=1, capsize=2)
        axes.set_xticks(range(len(factors)), [f"× {factor}" for factor in factors])
        axes.set_xlabel("copies of the image in the training set")
        axes.set_ylabel("copies per image\nin 1000 samples")
        axes.grid(axis="x", visible=False)
        axes.legend(fontsize=8.5)
        return _svg(figure, "dose")


def distance_chart(
    distances: dict[str, np.ndarray], threshold: float, measured: str, subjects: Sequence[str]
) -> str:
    """Histograms of the distance to the nearest training image, one below the other.

    Args:
        distances: name to (n,) values; nL2, or the negated similarity.
        threshold: copies lie to its left.
        measured: label of the axis.
        subjects: sample folders in order; other names are drawn as held out.
    """
    colours = series_colours(subjects)
    top = max(float(np.quantile(values, 0.995)) for values in distances.values())
    bottom = min(float(values.min()) for values in distances.values())
    edges = np.linspace(min(bottom, 0.0 if bottom >= 0 else bottom), top, 46)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.7, 3.3), layout="constrained")
        panels = figure.subplots(len(distances), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, values) in zip(panels, distances.items(), strict=True):
            colour = colours.get(name, HELD)
            heights = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values)
            axes.stairs(heights, edges, fill=True, color=colour, alpha=0.3)
            axes.stairs(heights, edges, color=colour, linewidth=1.2)
            axes.axvline(threshold, color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            axes.grid(visible=False)
            label = name if name in colours else "held out"
            axes.set_ylabel(label, color=colour, rotation=0, ha="right", va="center", labelpad=8)
        left = {"xytext": (-5, 0), "textcoords": "offset points", "ha": "right", "va": "bottom"}
        top_edge = ("data", "axes fraction")
        panels[0].annotate(
            "copies", (threshold, 1.02), xycoords=top_edge, **left, fontsize=8.5, color=MUTED
        )
        panels[-1].set_xlabel(measured)
        return _svg(figure, "distance")


def _error_bar(value: float, low: float, high: float) -> list[list[float]]:
    return [[max(value - low, 0)], [max(high - value, 0)]]


def _svg(figure: Figure, salt: str) -> str:
    """The drawing as inline SVG, without addresses, with the page's fonts and colours."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r"'?DejaVu Sans'?[^;\"]*", "var(--font)", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    # Names within a drawing must not meet those of the page's other drawings.
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{salt}-", text)


def write_picture(folder: EvaluationFolder, path: Path) -> None:
    """Draw the picture as PNG on white, so that it reads on light and dark pages."""
    columns = sorted({row["column"] for row in folder.pictures})[:MAX_COLUMNS]
    subjects: list[str | None] = [folder.reference, None, *folder.paired]
    cells = {(row["subject"], row["column"]): row for row in folder.pictures}
    # All in inches: labels, pictures, labels of the bars, bars.
    side, gap, labels, bars = 0.66, 0.06, 1.25, 2.2
    width = labels + len(columns) * (side + gap) + 1.1 + bars
    height = len(subjects) * (side + gap) + 0.35
    with matplotlib.rc_context({"font.size": 9, "text.color": BLACK}):
        figure = Figure(figsize=(width, height), facecolor=PAPER)
        for line, subject in enumerate(subjects):
            bottom = height - 0.15 - (line + 1) * (side + gap)
            label = "nearest\ntraining image" if subject is None else subject
            middle = (bottom + side / 2) / height
            figure.text((labels - 0.12) / width, middle, label, ha="right", va="center")
            for place, column in enumerate(columns):
                left = labels + place * (side + gap)
                axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
                _draw(axes, cells[subject, column])
        tall = min(height - 0.75, 0.42 * len(folder.subjects))
        left, bottom = (width - bars - 0.1) / width, (height - tall - 0.05) / 2 / height
        _bars(figure, folder, (left, bottom, bars / width, tall / height))
        figure.savefig(path, format="png", dpi=200, facecolor=PAPER)


def _draw(axes: Any, row: dict[str, Any]) -> None:
    opened = open_image(row["png"], "a picture of the evaluation")
    image = np.asarray(opened if opened.mode == "L" else opened.convert("RGB"))
    smooth = "nearest" if max(image.shape[:2]) < SMALL_IMAGE else "bilinear"
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation=smooth)
    axes.set_xticks([])
    axes.set_yticks([])
    source = row["subject"] is None
    for spine in axes.spines.values():
        spine.set_visible(not source)
        spine.set_linewidth(2)
        spine.set_color(BAD if row["copy"] else GOOD)
    if source and row["multiplicity"] > 1:
        box = {"facecolor": "#141416", "alpha": 0.82, "pad": 1.5, "linewidth": 0}
        corner = {"transform": axes.transAxes, "ha": "right", "va": "bottom", "bbox": box}
        text = f"×{row['multiplicity']}"
        axes.text(0.96, 0.06, text, **corner, color="white", fontsize=7, weight="bold")


def _bars(
    figure: Figure, folder: EvaluationFolder, place: tuple[float, float, float, float]
) -> None:
    """Rates of copies, one bar per subject, with Wilson's intervals."""
    axes = figure.add_axes(place)
    rates = [folder.metrics.get("copies", name) for name in folder.subjects]
    highest = max(rate.high or 0.0 for rate in rates if rate is not None)
    for line, rate in enumerate(rates):
        assert rate is not None and rate.low is not None and rate.high is not None
        value, low, high = (100 * v for v in (rate.value, rate.low, rate.high))
        axes.barh(line, value, 0.62, color=PRINTED_COLOURS[line % len(PRINTED_COLOURS)])
        ends = _error_bar(value, low, high)
        axes.errorbar(value, line, xerr=ends, color=BLACK, capsize=2, linewidth=1)
        axes.text(high + 3 * highest, line, f"{value:.1f} %" if value else "0 %", va="center")
    axes.set_yticks(range(len(folder.subjects)), folder.subjects)
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.0, 135 * highest))
    axes.set_title("samples that are copies, %", fontsize=9, loc="left", color=GREY)
    axes.tick_params(length=0, labelcolor=BLACK)
    axes.set_xticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
