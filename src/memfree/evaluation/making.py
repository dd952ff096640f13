"""What the report says of its making: data, models, samplers, versions, commands."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from memfree.evaluation.folder import EvaluationFolder


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
