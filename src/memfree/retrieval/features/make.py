"""Making a feature extractor from options, or from its description in an index folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from torch import Tensor

from memfree.folders.untrusted import short
from memfree.retrieval.features.base import Features, PixelFeatures, Whitened, identity
from memfree.retrieval.features.clip import CLIPFeatures
from memfree.retrieval.features.copy_detection import CopyDetectionFeatures
from memfree.retrieval.features.latents import LatentFeatures
from memfree.retrieval.features.sscd import SSCDFeatures
from memfree.retrieval.features.timm_model import EfficientNetFeatures, TimmFeatures
from memfree.retrieval.options import ExtractorOptions, FeatureName

_APPLIES: dict[FeatureName, tuple[str, ...]] = {
    "pixels": (),
    "efficientnet": (),
    "sscd": ("path", "sscd_model", "preprocessing", "trust_file", "dtype"),
    "clip": ("path", "model", "pretrained", "dtype"),
    "timm": ("path", "model", "pretrained", "seed", "dtype"),
    "latents": ("path", "dtype"),
    "copy_detection": ("path",),
}
"""Options of each extractor."""
HAVE_DTYPE = tuple(name for name, options in _APPLIES.items() if "dtype" in options)
"""Features whose network supports arithmetic other than float32."""
_DESCRIBED: dict[str, FeatureName] = {
    "pixels": "pixels",
    "efficientnet-lite0": "efficientnet",
    "sscd": "sscd",
    "clip": "clip",
    "timm": "timm",
    "vae-latents": "latents",
    "copy-detection": "copy_detection",
}
"""Names in descriptions; ``whitened`` wraps another extractor."""
_ARGUMENTS: dict[FeatureName, tuple[Callable[..., Features], tuple[str, ...]]] = {
    "pixels": (PixelFeatures, ()),
    "efficientnet": (EfficientNetFeatures, ()),
    "sscd": (SSCDFeatures, ("path", "model", "preprocessing", "trust_file", "dtype")),
    "clip": (CLIPFeatures, ("path", "model", "pretrained", "dtype")),
    "timm": (TimmFeatures, ("path", "model", "pretrained", "seed", "dtype")),
    "latents": (LatentFeatures.from_folder, ("path", "dtype")),
}


def _make(name: FeatureName, fields: dict[str, Any]) -> Features:
    make, arguments = _ARGUMENTS[name]
    return make(**{argument: fields[argument] for argument in arguments})


def make_features(name: FeatureName, options: ExtractorOptions) -> Features:
    """Make the extractor of this name; ValueError for missing or inapplicable options."""
    given, default = asdict(options), asdict(ExtractorOptions())
    for option, value in given.items():
        if value != default[option] and option not in _APPLIES[name]:
            raise ValueError(f"--extractor.{option} does not apply to --features {name}")
    if name in ("sscd", "latents", "copy_detection") and options.path is None:
        raise ValueError(f"--features {name} needs --extractor.path")
    if name == "copy_detection":
        assert options.path is not None
        return CopyDetectionFeatures.load(options.path)
    if name == "sscd":
        try:
            return _make(name, {**given, "model": options.sscd_model})
        except ValueError as error:
            raise ValueError(f"--extractor.path: {error}") from error
    if name == "clip":
        if (options.path is None) == (options.pretrained is None):
            raise ValueError(
                "--features clip needs either --extractor.path or --extractor.pretrained"
            )
        given["model"] = options.model or "ViT-B-32"
    if name == "timm":
        if options.model is None:
            raise ValueError("--features timm needs --extractor.model")
        if options.pretrained not in (None, "true", "false"):
            raise ValueError("--extractor.pretrained is true or false with --features timm")
        given["pretrained"] = options.pretrained == "true"
    return _make(name, given)


def features_from(
    description: dict[str, Any],
    tensors: dict[str, Tensor],
    weights: Path | None = None,
    trust_file: bool = False,
) -> Features:
    """Rebuild the extractor that wrote ``describe()`` and ``tensors()``, with ``weights`` if they
    moved. Nothing in the description is executed; a TorchScript file still needs ``trust_file``.
    ValueError if this version would write another description: distances would not compare."""
    name = description.get("name")
    try:
        if name == "whitened":
            base = description.get("base")
            if not isinstance(base, dict) or base.get("name") == "whitened":
                raise ValueError("whitened features name no extractor that they were made from")
            extractor = features_from(base, {}, weights, trust_file)
            features: Features = Whitened.from_tensors(extractor, tensors)
        elif name in _DESCRIBED:
            place = {} if weights is None else {"path": str(weights)}
            fields = {**description, **place, "trust_file": trust_file}
            features = _described(_DESCRIBED[name], fields, tensors)
        else:
            raise ValueError(
                f"unknown feature extractor {name!r}; this version has {', '.join(_DESCRIBED)} "
                "and whitened"
            )
    except (KeyError, TypeError) as error:
        raise ValueError(f"the description of {name} features is damaged: {error}") from error
    if identity(features.describe()) != identity(description):
        raise ValueError(
            f"features {name!r} were made with other preprocessing or weights than this version's; "
            "build the index again"
        )
    return features


def _described(name: FeatureName, fields: dict[str, Any], tensors: dict[str, Tensor]) -> Features:
    if name == "copy_detection":
        return CopyDetectionFeatures.from_description(fields, tensors)
    if name == "sscd":
        fields["preprocessing"] = fields["preset"]
    elif name == "latents" and fields["path"] is None:
        raise ValueError(
            "the index does not say where its VAE is: name its folder, "
            "ReferenceIndex.load(folder, weights=...)"
        )
    elif name == "timm":
        fields["seed"] = fields["seed"] or 0
    with _cached_repositories(fields) if name in ("clip", "timm") else nullcontext():
        return _make(name, fields)


@contextmanager
def _cached_repositories(description: dict[str, Any]) -> Iterator[None]:
    """Take a repository named by an index, not the user (``hf-hub:…``), from the cache only."""
    model = str(description["model"])
    if ":" not in model:
        yield
        return
    # The hub's own switch, HF_HUB_OFFLINE, is read when it is imported.
    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(
            f"the index was made with {short(model, 80)}, which is not in the cache here: "
            "download it first, if you trust it"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline
