"""HTML pages of an evaluation and of an audit; their text is in the templates beside this file."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from torch import Tensor

from memfree.evaluation.folder import EvaluationFolder
from memfree.evaluation.metrics import (
    CHANGED,
    HELDOUT,
    ROWS,
    Metric,
    Row,
    false_positives,
    number,
    percent,
    shown_rows,
)
from memfree.evaluation.plots import (
    SMALL_IMAGE,
    css_colours,
    distance_chart,
    dose_chart,
    trajectory_chart,
)
from memfree.images import to_bytes, to_png

MITIGATIONS = {
    "amg": "Anti-Memorization Guidance; ",
    "multiplicity": "multiplicity guidance; ",
    "both": "multiplicity guidance, then AMG; ",
    "reject": "copies drawn again; ",
}
"""What sample folders were made with, for the heads of the table."""
_CHANGES = {
    "noise_0.05": "noise of standard deviation 0.05, where pixels go from −1 to 1",
    "noise_0.1": "noise of 0.1",
    "noise_0.2": "noise of 0.2",
    "darker_20": "20 % less brightness",
    "shifted_1": "a shift by one pixel",
    "mirrored": "a mirror image",
    "cropped_12": "a crop by an eighth of each side",
    "jpeg_50": "JPEG at quality 50",
    "blurred": "a blur of one pixel",
}


def template(name: str, part: str = "evaluation") -> Template:
    """A template by its file name; it escapes what it shows.

    Args:
        name: of the file.
        part: folder of memfree that has it; what it includes may be of evaluation.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("memfree", folder) for folder in (part, "evaluation")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "number": number, "base64": _base64}
    return environment.get_template(name)


def _base64(image: bytes | Tensor) -> str:
    """A PNG, or an image (C, H, W) in [-1, 1] as PNG, for an address of the page itself."""
    png = image if isinstance(image, bytes) else to_png(to_bytes(image))
    return base64.b64encode(png).decode("ascii")


def _shape(height: int, width: int) -> dict[str, Any]:
    """How images are shown."""
    return {"aspect": f"{width} / {height}", "small": max(height, width) < SMALL_IMAGE}


def report_page(folder: EvaluationFolder) -> str:
    """The HTML page of an evaluation, which needs no network."""
    manifest, metrics = folder.manifest, folder.metrics
    data = manifest["dataset"]["manifest"]
    rates = {name: metrics.get("copies", name) for name in [*folder.subjects, HELDOUT]}
    copies = {name: rate for name, rate in rates.items() if rate is not None}
    others: dict[str, list[str]] = {}
    for name in folder.subjects[1:]:
        others.setdefault(_rate(copies[name]), []).append(name)
    return template("report.html").render(
        **_shape(*data["image_shape"][1:]),
        folder=folder,
        metrics=metrics,
        manifest=manifest,
        source=data.get("source") or {},
        heldout=HELDOUT,
        copies=copies,
        rate=_rate(copies[folder.reference]),
        others=others,
        false_positives=false_positives(copies[folder.reference]),
        guided=next((name for name in reversed(folder.subjects) if name in folder.paired), None),
        columns=sorted({row["column"] for row in folder.pictures}),
        cells={(row["subject"], row["column"]): row for row in folder.pictures},
        colours=css_colours(folder.subjects),
        mitigations=MITIGATIONS,
        rows=shown_rows(metrics),
        note=lambda row: _note(folder, row),
        differences=_differences(folder),
        charts=_charts(folder),
        known_copies={
            change: (first, second)
            for name, change in _CHANGES.items()
            if (first := metrics.get(f"copies_of_{name}", CHANGED))
            and (second := metrics.get(f"second_copies_of_{name}", CHANGED))
        },
        commands=_commands(folder),
        settings=_settings(folder),
    )


def _rate(copies: Metric) -> str:
    """A rate, with its upper limit where there is no copy."""
    if copies.value == 0 and copies.high is not None:
        return f"none of {copies.count} (at most {percent(copies.high)})"
    return percent(copies.value)


def _note(folder: EvaluationFolder, row: Row) -> str:
    if row.metric == "copies":
        return f"{row.note} Here: {100 * folder.manifest['false_positive_rate']:g} %."
    found = folder.metrics.get(row.metric, folder.reference)
    if row.metric == "second_copies" and found:
        return f"{row.note} Here: {found.detail['similarity']}."
    count = found.detail.get("equal_count") if found else None
    return f"{row.note} {count} images on each side." if count else row.note


def _differences(folder: EvaluationFolder) -> dict[str, list[tuple[str, str]]]:
    """Paired differences to the reference, (value, interval) by label; empty without pairs."""
    rows = {}
    for row in ROWS:
        cells = [folder.metrics.get(f"{row.metric}_difference", name) for name in folder.paired]
        if any(cells):
            rows[row.label] = [_difference(row, cell) for cell in cells]
    return rows


def _difference(row: Row, found: Metric | None) -> tuple[str, str]:
    def show(value: float) -> str:
        if row.show is percent:
            return f"{100 * value:+.1f} points"
        return f"{'+' if value > 0 else '−' if value < 0 else ''}{number(abs(value))}"

    if found is None:
        return "", ""
    if found.low is None or found.high is None:
        return show(found.value), ""
    return show(found.value), f"{show(found.low)} to {show(found.high)}"


def _charts(folder: EvaluationFolder) -> dict[str, Markup | None]:
    main = folder.metrics.get("copies", HELDOUT)
    assert main is not None
    nl2 = folder.metrics.get("nl2_minimum", HELDOUT) is not None
    what = "nL2 to the nearest training image" if nl2 else "negated similarity to it"
    subjects = [folder.reference, *folder.paired]
    charts = {
        "trajectory": trajectory_chart(folder.trajectories, subjects, folder.reference),
        "dose": dose_chart(folder.metrics, folder.subjects),
        "distance": distance_chart(
            folder.distances(), -main.detail["threshold"], what, folder.subjects
        ),
    }
    return {name: Markup(chart) if chart else None for name, chart in charts.items()}


def _commands(folder: EvaluationFolder) -> str:
    """The commands of dataset, index, models, samples and evaluation, in order, each once."""
    manifest = folder.manifest
    manifests = [manifest["dataset"]["manifest"], manifest["index"]["manifest"]]
    for name in folder.subjects:
        entry = manifest["samples"][name]
        manifests += [made for made in (entry.get("model"), entry["manifest"]) if made]
    lines = []
    for made in [*manifests, manifest]:
        words = made["made_by"]["command"]
        if words and words[0].strip("-c"):  # a Python session's name is "-", "-c" or empty
            program = Path(words[0]).name
            python = ["python"] if program.endswith(".py") else []
            lines.append(shlex.join([*python, program, *words[1:]]))
    lines.append(f"memfree report --evaluation {shlex.quote(str(folder.path))}")
    return "\n".join(dict.fromkeys(lines))


def _settings(folder: EvaluationFolder) -> str:
    """Everything the manifests say of how samples were drawn, as indented JSON."""
    settings: dict[str, Any] = {"plan": folder.manifest["dataset"]["manifest"].get("plan")}
    for name, entry in folder.manifest["samples"].items():
        model = entry.get("model") or {}
        settings[name] = {
            "samples": entry["manifest"].get("settings"),
            "model": model.get("identity"),
        }
    return json.dumps(settings, indent=2)


def audit_page(
    table: pa.Table,
    pictures: Tensor,
    nearest: Mapping[str, Tensor],
    facts: Mapping[str, str],
    warning: str,
) -> str:
    """The HTML page of an audit, which needs no network.

    Args:
        table: the audit, most suspicious first.
        pictures: (k, C, H, W) in [−1, 1]: the first k images of the table.
        nearest: training images by key, as far as they are known.
        facts: what was compared and how.
        warning: why nothing could be found, so that no discovery says little, or empty.
    """
    rows = table.slice(0, len(pictures)).to_pylist()
    return template("audit.html").render(
        **_shape(*pictures.shape[2:]),
        images=table.num_rows,
        discoveries=sum(table["discovery"].to_pylist()),
        copies=sum(table["copy"].to_pylist()),
        pairs=list(zip(rows, pictures, strict=True)),
        nearest=nearest,
        facts=facts,
        warning=warning,
    )
