"""HTML pages of an evaluation and of an audit."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape
from torch import Tensor

from memfree.evaluation.folder import EvaluationFolder
from memfree.evaluation.metrics import (
    CHANGED,
    HELDOUT,
    ROWS,
    Metric,
    Row,
    false_positives,
    interval_text,
    number,
    percent,
    shown_rows,
)
from memfree.evaluation.plots import css_colours
from memfree.images import to_bytes, to_png


def template(name: str, part: str = "evaluation") -> Template:
    """A template by its file name; it escapes what it shows.

    Args:
        name: of the file.
        part: folder of memfree that has it; what it includes may be of evaluation.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("memfree", one) for one in (part, "evaluation")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def facts(folder: EvaluationFolder) -> list[tuple[str, str]]:
    """Data, index, samplers and versions, as name and value."""
    data = folder.manifest["dataset"]["manifest"]
    index = folder.manifest["index"]["manifest"]
    made = folder.manifest["made_by"]
    parts = data.get("parts") or {}
    shape = " × ".join(str(side) for side in data["image_shape"])
    rows = [
        ("Data set", f"{_source(data)}, images of {shape}"),
        ("Its SHA-256", folder.manifest["dataset"]["hash"]),
        ("Parts", _parts(parts)),
        ("Repeated on purpose", _plan(data)),
        ("Index", f"{index.get('rows')} distinct images, {_feature(index)}, {index.get('metric')}"),
    ]
    for name in folder.subjects:
        rows.append((f"Samples: {name}", _sampler(folder.manifest["samples"][name]["manifest"])))
        model = folder.manifest["samples"][name].get("model")
        if model and name not in folder.paired:
            rows.append((f"Model: {name}", _model(model)))
    versions = ", ".join(f"{name} {version}" for name, version in made["packages"].items())
    rows.append(("Software", f"Python {made['python']}, {versions}"))
    rows.append(("Machine", str(made["device"])))
    rows.append(("Commit", str(made.get("git_commit") or "not from a checkout")))
    rows.append(("Evaluated", f"{made['created']}, seed {made['seed']}"))
    return [(name, value) for name, value in rows if value]


def _source(data: dict[str, Any]) -> str:
    source = data.get("source") or {}
    licence = source.get("licence")
    return f"{source.get('name', 'unknown source')}" + (f" (licence: {licence})" if licence else "")


def _parts(parts: dict[str, Any]) -> str:
    texts = []
    for name, part in parts.items():
        images, records = part.get("images"), part.get("records")
        same = records in (None, images)
        texts.append(f"{name} {images}" + ("" if same else f" ({records} records)"))
    return ", ".join(texts)


def _plan(data: dict[str, Any]) -> str:
    plan = data.get("plan") or {}
    repeated = data.get("repeated_images")
    if not repeated:
        return "nothing"
    factors = plan.get("ladder") or [plan.get("factor")]
    kinds = ", ".join(plan.get("kinds") or [])
    return f"{repeated} images, {', '.join(f'× {factor}' for factor in factors)} ({kinds} copies)"


def _feature(index: dict[str, Any]) -> str:
    return str((index.get("features") or {}).get("name", "features"))


def _sampler(manifest: dict[str, Any]) -> str:
    shown = ("mitigation", "scheduler", "steps", "guidance_scale", "seed", "count")
    return ", ".join(
        f"{name.replace('_', ' ')} {manifest[name]}"
        for name in shown
        if manifest.get(name) is not None
    )


def _model(manifest: dict[str, Any]) -> str:
    parts = [
        f"{manifest['parameters'] / 1e6:.2f} million weights"
        if manifest.get("parameters") is not None
        else "",
        f"{manifest['steps']} steps of {manifest.get('batch_size')}" if "steps" in manifest else "",
    ]
    exposures = manifest.get("exposures") or {}
    if exposures.get("largest"):
        parts.append(f"an image was trained on at most {exposures['largest']} times")
    return ", ".join(part for part in parts if part)


def commands(folder: EvaluationFolder) -> str:
    """The commands of data set, index, models, samples and evaluation, in order, each once."""
    manifest = folder.manifest
    made = [manifest["dataset"]["manifest"]["made_by"]]
    made.append(manifest["index"]["manifest"]["made_by"])
    for name in folder.subjects:
        entry = manifest["samples"][name]
        made += [
            made_by["made_by"] for made_by in (entry.get("model"), entry["manifest"]) if made_by
        ]
    made.append(manifest["made_by"])
    # A Python session has no command line; its name is "-", "-c" or empty.
    words = [entry["command"] for entry in made]
    lines = [_command(one) for one in words if one and one[0].strip("-c")]
    lines.append(f"memfree report --evaluation {shlex.quote(str(folder.path))}")
    return "\n".join(dict.fromkeys(lines))


def _command(words: list[str]) -> str:
    program = Path(words[0]).name
    words = ["python", program, *words[1:]] if program.endswith(".py") else [program, *words[1:]]
    return shlex.join(words)


def settings(folder: EvaluationFolder) -> str:
    """Everything the manifests say of how samples were drawn, as indented JSON."""
    kept = {
        name: {"samples": entry["manifest"].get("settings"), "model": _identity(entry.get("model"))}
        for name, entry in folder.manifest["samples"].items()
    }
    return json.dumps(
        {"plan": folder.manifest["dataset"]["manifest"].get("plan"), **kept}, indent=2
    )


def _identity(model: dict[str, Any] | None) -> Any:
    return None if model is None else model.get("identity")


SMALL_IMAGE = 64
"""Images of fewer pixels a side are shown as squares and not smoothed."""
MITIGATIONS = {
    "amg": "Anti-Memorization Guidance; ",
    "multiplicity": "multiplicity guidance; ",
    "both": "multiplicity guidance, then AMG; ",
    "reject": "copies drawn again; ",
}
"""What sample folders were made with, for the heads of the table."""


def headline(folder: EvaluationFolder) -> tuple[Markup, str]:
    """The one sentence, with the rates of copies, and the one below it, with their price."""
    copies = {name: folder.metrics.get("copies", name) for name in folder.subjects}
    first = copies[folder.reference]
    assert first is not None
    names: dict[str, list[str]] = {}
    for name, found in copies.items():
        if found is not None and name != folder.reference:
            names.setdefault(_rate(found), []).append(str(escape(name)))
    rest = [f"<b>{rate}</b> with {' and with '.join(same)}" for rate, same in names.items()]
    reference = escape(folder.reference)
    if first.value == 0:
        sentence = f"Of the {reference} samples {_rate(first)} copies a training image"
    else:
        sentence = f"<em>{_rate(first)}</em> of the {reference} samples copy a training image"
    if rest:
        sentence += f"; {_listed(rest)}"
    return Markup(sentence + "."), _lead(folder, first)


def _lead(folder: EvaluationFolder, copies: Metric) -> str:
    held = folder.metrics.get("copies", HELDOUT)
    parts = [
        f"{copies.count} samples. A copy is nearer to a training image than all but "
        f"{false_positives(copies)} of real images that were never trained on"
        + (f"; of {held.count} others, {percent(held.value)} are called so." if held else ".")
    ]
    best = next((name for name in reversed(folder.subjects) if name in folder.paired), None)
    before, after, floor = (
        folder.metrics.get("frechet_efficientnet", name) if name else None
        for name in (folder.reference, best, HELDOUT)
    )
    if before and after and floor:
        parts.append(
            f"The Fréchet distance to held-out images is {number(before.value)} {folder.reference} "
            f"and {number(after.value)} with {best}; that of training images is "
            f"{number(floor.value)}."
        )
    return " ".join(parts)


def _rate(found: Metric) -> str:
    """A rate, with its upper limit where nothing was found."""
    if found.value == 0 and found.high is not None:
        return f"none of {found.count} (at most {percent(found.high)})"
    return percent(found.value)


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def strip(folder: EvaluationFolder) -> dict[str, Any]:
    """Rows of pictures: the reference's samples, their nearest training images, guided samples."""
    if not folder.pictures:
        return {"columns": [], "rows": [], "aspect": "1 / 1", "small": False}
    columns = sorted({row["column"] for row in folder.pictures})
    cells = {(row["subject"], row["column"]): row for row in folder.pictures}
    channels, height, width = folder.manifest["dataset"]["manifest"]["image_shape"]
    order: list[tuple[str | None, str, str]] = [
        (folder.reference, folder.reference, "sample"),
        (None, "nearest training image", "of the sample above"),
        *((name, name, "same noise") for name in folder.paired),
    ]
    rows = [
        {
            "label": label,
            "note": note,
            "cells": [_cell(cells[subject, column]) for column in columns],
        }
        for subject, label, note in order
    ]
    return {
        "columns": columns,
        "rows": rows,
        "aspect": f"{width} / {height}",
        "small": max(height, width) < SMALL_IMAGE,
        "caption": "Chosen by rule: the first copies among the samples, if any, each of another "
        "training image, then what is nearest to one. The second row is the training data itself.",
    }


def _cell(row: dict[str, Any]) -> dict[str, Any]:
    source = row["subject"] is None
    if source:
        title = f"training image {row['key']}, {row['multiplicity']} records"
    else:
        verdict = "a copy" if row["copy"] else "not a copy"
        title = f"sample {row['sample']}, {verdict}, σ = {row['sigma']:.3f}, nearest {row['key']}"
    return {
        "png": base64.b64encode(row["png"]).decode("ascii"),
        "kind": "source" if source else "copy" if row["copy"] else "fine",
        "title": title,
        "badge": f"× {row['multiplicity']}" if source and row["multiplicity"] > 1 else "",
    }


def figures(folder: EvaluationFolder) -> dict[str, Any]:
    """The table: rows of metrics, a column a subject, the held-out images last."""
    colours = css_colours(folder.subjects)
    columns = [
        {"label": name, "note": _column_note(folder, name), "colour": colours[name], "held": False}
        for name in folder.subjects
    ]
    columns.append({"label": "held out", "note": "real images", "colour": None, "held": True})
    rows: list[dict[str, Any]] = []
    section = ""
    for row in shown_rows(folder.metrics):
        cells = [
            _figure(folder, row, name, name == HELDOUT) for name in [*folder.subjects, HELDOUT]
        ]
        opens = row.section if row.section != section else ""
        note = _row_note(folder, row)
        rows.append({"label": row.label, "note": note, "cells": cells, "opens": opens})
        section = row.section
    return {
        "columns": columns,
        "rows": rows,
        "caption": "The held-out column is what real images give that were never trained on: the "
        "floor that a model without memorization would reach.",
    }


def _column_note(folder: EvaluationFolder, name: str) -> str:
    count = len_of(folder, name)
    how = MITIGATIONS.get(str(folder.manifest["samples"][name]["manifest"].get("mitigation")), "")
    return f"{how}{count} samples" + (", same noise" if name in folder.paired else "")


def len_of(folder: EvaluationFolder, name: str) -> int:
    """How many samples a subject has."""
    return int(folder.manifest["samples"][name]["manifest"]["count"])


def _row_note(folder: EvaluationFolder, row: Row) -> str:
    if row.metric == "copies":
        return f"{row.note} Here: {100 * folder.manifest['false_positive_rate']:g} %."
    found = folder.metrics.get(row.metric, folder.reference)
    if row.metric == "second_copies" and found:
        return f"{row.note} Here: {found.detail['similarity']}."
    count = found.detail.get("equal_count") if found else None
    return f"{row.note} {count} images on each side." if count else row.note


def _figure(folder: EvaluationFolder, row: Row, name: str, held: bool) -> dict[str, Any]:
    found = folder.metrics.get(row.metric, name)
    if found is None:
        return {"value": "", "interval": "", "extra": "", "held": held}
    extra = ""
    if row.metric == "duplicated_share" and not held:
        fair = folder.metrics.get("duplicated_fair_share", name)
        extra = f"fair: {percent(fair.value)}" if fair else ""
    return {
        "value": row.show(found.value),
        "interval": interval_text(found, row),
        "extra": extra,
        "held": held,
    }


def differences(folder: EvaluationFolder) -> dict[str, Any] | None:
    """Paired differences to the reference, None where nothing is paired."""
    rows = []
    for row in ROWS:
        cells = [folder.metrics.get(f"{row.metric}_difference", name) for name in folder.paired]
        if any(cells):
            rows.append({"label": row.label, "cells": [_difference(row, cell) for cell in cells]})
    return {"columns": folder.paired, "rows": rows} if rows else None


def _difference(row: Row, found: Metric | None) -> dict[str, str]:
    if found is None:
        return {"value": "", "interval": ""}
    show = (lambda value: f"{100 * value:+.1f} points") if row.show is percent else _signed
    interval = ""
    if found.low is not None and found.high is not None:
        interval = f"{show(found.low)} to {show(found.high)}"
    return {"value": show(found.value), "interval": interval}


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{number(abs(value))}"


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


def known_copies(folder: EvaluationFolder) -> list[dict[str, str]]:
    """How many training images changed on purpose either measure finds."""
    rows = []
    for name, what in _CHANGES.items():
        first = folder.metrics.get(f"copies_of_{name}", CHANGED)
        second = folder.metrics.get(f"second_copies_of_{name}", CHANGED)
        if first and second:
            found = {"first": percent(first.value), "second": percent(second.value)}
            rows.append({"change": what, **found})
    return rows


LIMITS = (
    "AMG steers by the first measure, and its last step moves what is left just past that "
    "measure's threshold; rejection draws again by it. Judge them by the rows below it: the second "
    "measure, the share of repeated images, and the distances.",
    "A copy is a whole image that is near as a whole. Copied parts, styles and contents, and "
    "images mirrored or cropped, are not seen by pixel distance.",
    "Only images in the reference index can be found. What a source holds twice under other "
    "pixels counts as two images unless it was grouped.",
    "No copy among n samples is no proof: the intervals say what rate is still possible.",
    "Fréchet distances depend on extractor and count; compare them within this page only.",
    "Intervals are over samples of one trained model. Another training gives another model.",
)
"""What the measures miss."""


AUDIT_LIMITS = (
    "A copy is a whole image that is near a whole image of the index. Crops, mirrored images, "
    "copied parts, styles and contents are seen only as far as the index's features see them.",
    "Only images in the index can be found.",
    "p-values compare with held-out real images. Generated images, or images of another kind, can "
    "be nearer to training images than real ones without being copies; look at the pairs.",
    "The false discovery rate is an average over audits, not a promise for this one.",
)
"""What an audit does not say."""


def render(
    table: pa.Table,
    pictures: Tensor,
    nearest: Mapping[str, Tensor],
    facts: Mapping[str, str],
    warning: str,
) -> str:
    """The page's HTML, which needs no network.

    Args:
        table: the audit, most suspicious first.
        pictures: (k, C, H, W) in [−1, 1]: the first k images of the table.
        nearest: training images by key, as far as they are known.
        facts: what was compared and how.
        warning: why nothing could be found, so that no discovery says little, or empty.
    """
    rows = table.slice(0, len(pictures)).to_pylist()
    discoveries, copies = (sum(table[name].to_pylist()) for name in ("discovery", "copy"))
    height, width = pictures.shape[2:]
    return template("audit.html").render(
        headline=_headline(discoveries, table.num_rows, undecided=bool(warning)),
        lead=f"{copies} are above the threshold for a single image. Shown are the "
        f"{len(rows)} that are nearest to an indexed image, each with that image below it.",
        pairs=[
            _pair(row, image, nearest.get(row["nearest_key"]))
            for row, image in zip(rows, pictures, strict=True)
        ],
        aspect=f"{width} / {height}",
        small=max(height, width) < SMALL_IMAGE,
        shows_training=bool(nearest),
        facts=list(facts.items()),
        warning=warning,
        limits=AUDIT_LIMITS,
    )


def _headline(discoveries: int, images: int, undecided: bool) -> str:
    """What was found; that none could be found is no finding of none."""
    if undecided:
        return (
            f"Undecided: there are too few calibration images to tell copies among {images} images"
        )
    return f"{discoveries} of {images} images are called copies of indexed images"


def _pair(row: dict[str, Any], image: Tensor, nearest: Tensor | None) -> dict[str, Any]:
    return {
        **row,
        "png": _encoded(image),
        "nearest_png": None if nearest is None else _encoded(nearest),
        "kind": "copy" if row["discovery"] else "near" if row["copy"] else "fine",
    }


def _encoded(image: Tensor) -> str:
    return base64.b64encode(to_png(to_bytes(image))).decode("ascii")
