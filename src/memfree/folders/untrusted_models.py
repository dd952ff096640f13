"""Untrusted model folders: checked before a library builds or loads anything from them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import ModelMixin, SchedulerMixin
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memfree.folders.untrusted import check_plain_folder, read_json, short

_LIBRARIES: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_PARTS: dict[str, tuple[str, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderTiny"),
    "text_encoder": _TEXT_ENCODERS,
    "text_encoder_2": _TEXT_ENCODERS,
    "tokenizer": _TOKENIZERS,
    "tokenizer_2": _TOKENIZERS,
    "feature_extractor": ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"),
    "image_encoder": ("CLIPVisionModelWithProjection",),
}
"""Allowed classes of pipeline parts (others may request hub files); any scheduler of diffusers."""
_FOLDER_TOKENIZERS = (
    *_TOKENIZERS,
    *(
        f"{name}Tokenizer{kind}"
        for name in ("Bert", "Roberta", "XLMRoberta", "T5", "Gemma", "Siglip", "Nllb", "GPT2")
        for kind in ("", "Fast")
    ),
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
)
"""Tokenizers that a CLIP's folder may name; all of them read plain files."""
_CONFIG_BYTES = 4 << 20
_LARGEST = 1 << 20  # of any number in a configuration
_LAYERS = 256  # of any number that a library loops over to build
_TIMESTEPS = 100_000
_CODE = (
    "auto_map",
    "quantization_config",
    "custom_pipelines",
    "trust_remote_code",
    "kernel_config",
    "use_kernels",
    "fusion_config",
)
"""Keys that name further code or packages."""
_ATTENTION = re.compile("_*(attn|experts)_implementation(_internal)?")
_BUILT_IN = (None, "eager", "sdpa")  # other kinds of attention are downloaded as code
_OWN_NAMES = ("_name_or_path", "name_or_path")  # of what a part was made from; nothing reads it
_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "generation_config.json")
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_SPARE = 1 << 20  # weights that a network may have beyond its file: buffers, mostly


def read_config(path: Path) -> dict[str, Any]:
    """Configuration of diffusers or transformers, without absurd numbers or names of code."""
    value = read_json(path, _CONFIG_BYTES)
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a configuration but {short(repr(value), 40)}")
    _refuse_code(value, path)
    for key, number in _values(value):
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            continue
        limit = _LAYERS if "layers" in key or key.startswith("num_hidden") else _LARGEST
        if not -_LARGEST <= number <= limit:
            raise ValueError(f"{path}: {short(key, 40)} {short(number, 40)} is absurdly large")
    return value


def _refuse_code(config: dict[str, Any], path: Path) -> None:
    for key, value in _values(config):
        if _ATTENTION.fullmatch(key):
            is_harmless = value in _BUILT_IN
        else:
            is_harmless = key not in _CODE or _says_nothing(value)
        if not is_harmless:
            raise ValueError(f"{path} has {short(key, 40)}, which could load code: remove it")


def _says_nothing(value: Any) -> bool:
    return value is None or value is False


def _read_own_config(path: Path) -> dict[str, Any]:
    """Configuration of a network or scheduler, which names no other file, folder or repository."""
    config = read_config(path)
    for key, value in _values(config):
        if key not in _OWN_NAMES and isinstance(value, str) and {"/", "\\"} & {*value}:
            raise ValueError(f"{path}: {short(key, 40)} names {short(value, 60)}: remove it")
    return config


def check_network(kind: Any, folder: Path) -> None:
    """Refuse, before it is built, a network (class ``kind``) much larger than its weights."""
    check_plain_folder(folder)
    config = _read_own_config(folder / "config.json")
    _check_other_files(folder)
    try:
        with torch.device("meta"):  # has shapes, but no memory
            if issubclass(kind, PreTrainedModel):
                network = kind(kind.config_class.from_dict(config))
            else:
                network = kind.from_config(config)
        needed = sum(value.numel() for value in network.state_dict().values())
    except Exception as error:  # whatever a library makes of wrong values
        raise ValueError(
            f"{folder / 'config.json'} is not a {kind.__name__}: {short(error)}"
        ) from error
    present = sum(_weights(path) for path in sorted(folder.glob("*.safetensors")))
    if needed > 2 * present + _SPARE:
        raise ValueError(
            f"{folder}: the weights are of another network than config.json, which needs {needed} "
            f"numbers where there are {present}: copy the model folder whole"
        )


def check_scheduler(folder: Path) -> str:
    """Class of a scheduler's folder, once its numbers are sound."""
    path = folder / "scheduler_config.json"
    config = _read_own_config(path)
    name, steps = config.get("_class_name"), config.get("num_train_timesteps", 1)
    if not isinstance(name, str):
        raise ValueError(f"{path} is not a scheduler's configuration: it names no class")
    if type(steps) is not int or not 0 < steps <= _TIMESTEPS:
        raise ValueError(
            f"{path}: num_train_timesteps {short(repr(steps), 40)} is not a number of steps"
        )
    return name


def check_tokenizer(folder: Path, must_be_named: bool = False) -> None:
    """Refuse a tokenizer's folder that names code, other files, or an unknown class.

    ``must_be_named``: tokenizer_config.json must name the class, else sought in other files.
    """
    for name in ("tokenizer_config.json", "config.json"):
        path = folder / name
        must_be_named &= name == "tokenizer_config.json"
        if not path.exists() and not must_be_named:
            continue
        config = _read_tokenizer(path)
        kind = config.get("tokenizer_class")
        if kind not in _FOLDER_TOKENIZERS and (kind is not None or must_be_named):
            raise ValueError(f"{path}: tokenizer_class {short(repr(kind), 40)} is not supported")
        # Such as vocab_file, which would be read instead of the folder's own.
        for key, value in config.items():
            is_file = key.endswith("_file") and key != "special_tokens_map_file"
            if is_file and not _says_nothing(value):
                raise ValueError(
                    f"{path} has {short(key, 40)}, which names another file: remove it"
                )
    _check_other_files(folder)


def _read_tokenizer(path: Path) -> dict[str, Any]:
    """The greatest length in a tokenizer's configuration is often 10^30."""
    value = read_json(path, _CONFIG_BYTES, any_number=True)
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a tokenizer's configuration")
    _refuse_code(value, path)
    return value


def check_pipeline_folder(folder: Path) -> dict[str, Any]:
    """Checked ``model_index.json`` of a pipeline, with the configurations of its parts."""
    path = folder / "model_index.json"
    check_plain_folder(folder)
    index = read_config(path)
    check_parts(index, str(path))
    for part, value in _named(index):
        kind = _kind_of(part, *value)
        inner = folder / part
        if not inner.is_dir():
            continue
        if issubclass(kind, SchedulerMixin):
            check_scheduler(inner)
        elif issubclass(kind, (ModelMixin, PreTrainedModel)):
            check_network(kind, inner)
        elif issubclass(kind, PreTrainedTokenizerBase):
            check_tokenizer(inner)
        else:
            _check_other_files(inner)
    return index


def _check_other_files(folder: Path) -> None:
    """Refuse adapters, which name their base model, and weights listed outside the folder."""
    for name in _ADAPTERS:
        if (folder / name).exists():
            raise ValueError(
                f"{folder / name}: adapters inside a part of a pipeline are not loaded: merge them "
                "into the weights, or move the file away"
            )
    for name in _PROCESSORS:
        if (folder / name).exists():
            read_config(folder / name)
    for path in folder.glob("*.index.json"):
        listed = read_config(path).get("weight_map")
        if not isinstance(listed, dict) or not all(
            isinstance(file, str) and re.fullmatch(r"[\w.-]+", file) for file in listed.values()
        ):
            raise ValueError(f"{path} does not list the weight files of its folder")


def check_parts(index: dict[str, Any], name: str) -> None:
    """Refuse a pipeline's list of parts with classes that are not allowed."""
    kind = index.get("_class_name")
    if not isinstance(kind, str) or not kind.isidentifier():
        raise ValueError(f"{name} does not name a pipeline but {short(repr(kind), 40)}")
    if kind not in PIPELINES:
        raise ValueError(
            f"{name} is a {short(kind, 60)}: only {' and '.join(PIPELINES)} are trained and "
            "sampled here; memfree.guard takes more"
        )
    for part, (library, kind) in _named(index):
        if _kind_of(part, library, kind) is None:
            raise ValueError(
                f"{name} names {short(library, 40)}.{short(kind, 40)} as its {short(part, 40)}, "
                "which is not supported there"
            )


def _kind_of(part: str, library: str, name: str) -> Any:
    if part == "safety_checker" and library == "stable_diffusion":
        return StableDiffusionSafetyChecker if name == "StableDiffusionSafetyChecker" else None
    if part == "scheduler":
        known = library == "diffusers" and re.fullmatch(r"\w+Scheduler", name) is not None
    else:
        known = library in _LIBRARIES and name in _PARTS.get(part, ())
    kind = getattr(_LIBRARIES[library], name, None) if known else None
    wanted = SchedulerMixin if part == "scheduler" else object
    return kind if isinstance(kind, type) and issubclass(kind, wanted) else None


def _named(index: dict[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    for part, value in index.items():
        if part.startswith("_") or not isinstance(value, list) or value == [None, None]:
            continue
        if len(value) != 2 or not all(isinstance(word, str) for word in value):
            raise ValueError(
                f"model_index.json names {short(repr(value), 60)} as its {short(part, 40)}"
            )
        yield part, (value[0], value[1])


def _values(value: Any, key: str | None = None) -> Iterator[tuple[str, Any]]:
    if key is not None:
        yield key, value
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _values(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _values(inner, key)


def _weights(path: Path) -> int:
    """Number of weights by the safetensors header, at most what the file's bytes can hold."""
    try:
        with safe_open(path, framework="pt") as file:  # checks shapes and offsets against the bytes
            names = file.keys()
            return sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    except (SafetensorError, OSError):
        return 0  # the library will say what is wrong
