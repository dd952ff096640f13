"""A study's folder belongs to one set of numbers: others would be taken for them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from memfree.folders.atomic_files import write_json
from memfree.folders.manifest import check_kind
from memfree.study.plan import Options, Plan
from memfree.untrusted import read_json

NUMBERS = ("source", "duplicated", "steps", "count", "guidance_scale", "shared_data")
"""Options of a study that all models and figures of its folder have in common."""
_HOW = ("batch_size", "trainer.devices", "trainer.enable_progress_bar", "trainer.logger")
"""Options of commands, and what is below them, that change how something is made, not what: the
commands decide whether they take what is there. The batch size of training is data.batch_size."""


def claim(plan: Plan) -> None:
    """Refuse a folder that holds a study of another size; its figures would be taken for ours.

    Models are compared by name: further ones may join those that are there.

    Raises:
        ValueError: ``out`` was begun with other numbers, or holds something else.
    """
    check_kind(plan.out, "study")
    asked = _asked(plan)
    path = plan.out / "study.json"
    begun = read_json(path) if path.is_file() else {}
    if not isinstance(begun, dict) or not isinstance(begun.get("models", {}), dict):
        raise ValueError(f"{path} is no study's file; choose another --out")
    for option, value, known in _compared(begun, asked):
        if known != value:
            raise ValueError(
                f"{plan.out} holds a study with --{option} {known}, not {value}; "
                "choose another --out"
            )
    both = {**begun, **asked, "models": {**begun.get("models", {}), **asked["models"]}}
    if both != begun:
        write_json(path, both)


def _asked(plan: Plan) -> dict[str, Any]:
    asked = {name: getattr(plan, name) for name in NUMBERS}
    asked["models"] = {name: _what(options) for name, options in plan.models.items()}
    for command, options in asdict(plan.options).items():
        asked[f"options.{command}"] = _what(options)
    asked = json.loads(json.dumps(asked, default=str))
    assert isinstance(asked, dict)
    return asked


def _compared(begun: dict[str, Any], asked: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Option, value now and value then of what both studies have.

    Studies begun before an option existed had its only value.
    """
    found = []
    for option, value in asked.items():
        if option == "models":
            then = begun.get("models", {})
            found += [
                (f"models.{name}", one, _what(then[name]))
                for name, one in value.items()
                if name in then
            ]
        elif option in begun:
            found.append((option, value, _what(begun[option])))
    return found


def _what(options: Any) -> Any:
    """Options of a command without those of ``_HOW``, any other value as it is."""
    if not isinstance(options, dict):
        return options
    kept: Options = {
        name: value
        for name, value in options.items()
        if not any(name == how or name.startswith(f"{how}.") for how in _HOW)
    }
    return kept
