"""What a diffusers folder of others says of itself, looked at before a library acts on it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import ModelMixin, SchedulerMixin
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from memfree.untrusted import check_plain_folder, read_json, short

_LIBRARIES: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
_PARTS: tuple[Any, ...] = (
    ModelMixin,
    SchedulerMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    BaseImageProcessor,
)
_CONFIG_BYTES = 4 << 20
_LARGEST = 1 << 20  # of any number in a configuration
_LAYERS = 256  # of any number that a library loops over to build
_TIMESTEPS = 100_000
_CODE = ("auto_map", "quantization_config", "custom_pipelines")  # name further code or packages
_SPARE = 1 << 20  # weights that a network may have beyond its file: buffers, mostly


def read_config(path: Path) -> dict[str, Any]:
    """A configuration of diffusers or transformers, without absurd numbers or names of code.

    Raises:
        ValueError: it is none; the message begins with ``path``.
        FileNotFoundError: there is no such file.
    """
    value = read_json(path, _CONFIG_BYTES)
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no configuration but {short(repr(value), 40)}")
    for name in _CODE:
        if value.get(name) is not None:
            raise ValueError(f"{path} has {name}, which could load code: remove it")
    for key, number in _numbers(value):
        limit = _LAYERS if "layers" in key or key.startswith("num_hidden") else _LARGEST
        if not -_LARGEST <= number <= limit:
            raise ValueError(f"{path}: {short(key, 40)} {short(number, 40)} is absurdly large")
    return value


def check_network(kind: Any, folder: Path) -> None:
    """Refuse a network that would be much larger than its weights, before it is built.

    Args:
        kind: its class, of diffusers or transformers.
        folder: with config.json and safetensors.

    Raises:
        ValueError: the configuration is damaged, or of another network than the weights.
    """
    check_plain_folder(folder)
    config = read_config(folder / "config.json")
    try:
        with torch.device("meta"):  # has shapes, but no memory
            if issubclass(kind, PreTrainedModel):
                network = kind(kind.config_class.from_dict(config))
            else:
                network = kind.from_config(config)
        needed = sum(value.numel() for value in network.state_dict().values())
    except Exception as error:  # whatever a library makes of wrong values
        raise ValueError(
            f"{folder / 'config.json'} is no {kind.__name__}: {short(error)}"
        ) from error
    held = sum(_weights(path) for path in sorted(folder.glob("*.safetensors")))
    if needed > 2 * held + _SPARE:
        raise ValueError(
            f"{folder}: the weights are of another network than config.json, which needs {needed} "
            f"numbers where there are {held}: copy the model folder whole"
        )


def check_scheduler(folder: Path) -> str:
    """The class that a scheduler's folder names, once its numbers are sound.

    Raises:
        ValueError: it is no scheduler's configuration.
        FileNotFoundError: there is none.
    """
    path = folder / "scheduler_config.json"
    config = read_config(path)
    name, steps = config.get("_class_name"), config.get("num_train_timesteps", 1)
    if not isinstance(name, str):
        raise ValueError(f"{path} is not a scheduler's configuration: it names no class")
    if type(steps) is not int or not 0 < steps <= _TIMESTEPS:
        raise ValueError(
            f"{path}: num_train_timesteps {short(repr(steps), 40)} is no number of steps"
        )
    return name


def check_pipeline_folder(folder: Path) -> dict[str, Any]:
    """The ``model_index.json`` of a pipeline whose parts are all of diffusers or transformers.

    Raises:
        ValueError: it names another module, something else than a part of a pipeline, or a part
            whose configuration is refused.
    """
    path = folder / "model_index.json"
    check_plain_folder(folder)
    index = read_config(path)
    check_parts(index, str(path))
    for part, value in _named(index):
        kind = getattr(_LIBRARIES.get(value[0]), value[1], None)
        inner = folder / part
        if not (kind and inner.is_dir()):
            continue
        if issubclass(kind, SchedulerMixin):
            check_scheduler(inner)
        elif issubclass(kind, (ModelMixin, PreTrainedModel)):
            check_network(kind, inner)
    return index


def check_parts(index: dict[str, Any], name: str) -> None:
    """Refuse a pipeline's list of parts that names anything but classes of the two libraries.

    Raises:
        ValueError: in one line that begins with ``name``.
    """
    if not isinstance(kind := index.get("_class_name"), str) or not kind.isidentifier():
        raise ValueError(f"{name} names no pipeline but {short(repr(kind), 40)}")
    for part, value in _named(index):
        library, kind = value
        if library == "stable_diffusion" and part == "safety_checker":
            continue
        found = getattr(_LIBRARIES.get(library), kind, None) if re.fullmatch(r"\w+", kind) else None
        if not re.fullmatch(r"\w+", part) or not (
            isinstance(found, type) and issubclass(found, _PARTS)
        ):
            raise ValueError(
                f"{name} names {short(library, 40)}.{short(kind, 40)} as its {short(part, 40)}, "
                "which is no part of a pipeline"
            )


def _named(index: dict[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Parts and their library and class; those that a pipeline does without are left out."""
    for part, value in index.items():
        if part.startswith("_") or not isinstance(value, list) or value == [None, None]:
            continue
        if len(value) != 2 or not all(isinstance(one, str) for one in value):
            raise ValueError(
                f"model_index.json names {short(repr(value), 60)} as its {short(part, 40)}"
            )
        yield part, (value[0], value[1])


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a JSON value, with the name nearest to it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value


def _weights(path: Path) -> int:
    """Numbers in a safetensors file as its header says, no more than its bytes can hold."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size, 100 << 20):
            return 0
        try:
            header = json.loads(file.read(length))
            shapes = [value["shape"] for name, value in header.items() if name != "__metadata__"]
            found = sum(int(torch.Size(shape).numel()) for shape in shapes)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, RuntimeError):
            return 0  # the library will say what is wrong
    return min(found, size)
