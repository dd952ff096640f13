"""Plots of a report, in matplotlib, for dark and light pages."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from memfree.evaluation.metrics import COPIES_OF_FACTOR, MetricTable

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
    """σ_t against λ_t, a panel a subject: noise that unguided became a copy, and the rest.

    Args:
        rows: of ``trajectories.parquet``.
        subjects: panels, in order.
        reference: the subject whose copies define the groups.

    Returns:
        SVG, None if no subject has a trace.
    """
    shown = [name for name in subjects if any(row["subject"] == name for row in rows)]
    if not shown:
        return None
    colours = series_colours(subjects)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 3.3), layout="constrained")
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, shown, strict=True):
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
        t = [row["t"] for row in part]
        column = {
            q: np.array([row[q] for row in part]) for q in ("q10", "q25", "q50", "q75", "q90")
        }
        axes.fill_between(t, column["q10"], column["q90"], color=shade, alpha=0.13, linewidth=0)
        axes.fill_between(t, column["q25"], column["q75"], color=shade, alpha=0.22, linewidth=0)
        axes.plot(t, column["q50"], color=shade, linewidth=1.8, label=label)
    limit = [(row["t"], row["lambda"]) for row in rows if row["lambda"] is not None]
    if limit:
        limit = sorted(set(limit))
        axes.plot(
            *zip(*limit, strict=True),
            color=INK,
            linewidth=1.2,
            linestyle=(0, (4, 3)),
            label="threshold λ$_t$",
        )
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
                axes.bar(
                    middle,
                    value,
                    width * 0.86,
                    color=colours[name],
                    alpha=0.85,
                    label=name if x == 0 else None,
                )
                axes.errorbar(
                    middle,
                    value,
                    [[max(value - found.low * scale, 0)], [max(found.high * scale - value, 0)]],
                    color=INK,
                    linewidth=1,
                    capsize=2,
                )
        axes.set_xticks(range(len(factors)), [f"× {factor}" for factor in factors])
        axes.set_xlabel("records of an image in the training set")
        axes.set_ylabel("copies per image\nin 1000 samples")
        axes.grid(axis="x", visible=False)
        axes.legend(fontsize=8.5)
        return _svg(figure, "dose")


def distance_chart(
    distances: dict[str, np.ndarray], threshold: float, label: str, subjects: Sequence[str]
) -> str:
    """Histograms of the distance to the nearest training image, one below the other.

    Args:
        distances: name to (n,) values; nL2, or the negated similarity.
        threshold: copies lie to its left.
        label: of the axis.
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
            shown = "held out" if name not in colours else name
            axes.set_ylabel(shown, color=colour, rotation=0, ha="right", va="center", labelpad=8)
        panels[0].annotate(
            "copies",
            (threshold, 1.02),
            xycoords=("data", "axes fraction"),
            xytext=(-5, 0),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=8.5,
            color=MUTED,
        )
        panels[-1].set_xlabel(label)
        return _svg(figure, "distance")


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
