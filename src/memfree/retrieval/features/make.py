"""Make a feature extractor: from options, or again from what an index folder says of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from torch import Tensor

from memfree.folders.untrusted import short
from memfree.retrieval.features.base import Features, PixelFeatures, identity
from memfree.retrieval.features.clip import CLIPFeatures
from memfree.retrieval.features.copy_detection import CopyDetectionFeatures
from memfree.retrieval.features.efficientnet import EfficientNetFeatures
from memfree.retrieval.features.latents import LatentFeatures
from memfree.retrieval.features.sscd import SSCDFeatures
from memfree.retrieval.features.timm_model import TimmFeatures
from memfree.retrieval.features.whitened import Whitened
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
"""Which options each extractor has."""
HAVE_DTYPE = tuple(name for name, options in _APPLIES.items() if "dtype" in options)
"""Features whose network can work in another arithmetic than float32."""


def make_features(name: FeatureName, options: ExtractorOptions) -> Features:
    """The extractor of this name.

    Raises:
        FileNotFoundError: its weights are not there.
        ValueError: an option is missing, does not apply, or does not fit the weights.
    """
    given, default = asdict(options), asdict(ExtractorOptions())
    for option, value in given.items():
        if value != default[option] and option not in _APPLIES[name]:
            raise ValueError(f"--extractor.{option} does not apply to --features {name}")
    if name == "pixels":
        return PixelFeatures()
    if name == "efficientnet":
        return EfficientNetFeatures()
    if name in ("sscd", "latents", "copy_detection") and options.path is None:
        raise ValueError(f"--features {name} needs --extractor.path")
    if name == "sscd":
        try:
            return _sscd({**given, "model": options.sscd_model}, options.trust_file)
        except ValueError as error:
            raise ValueError(f"--extractor.path: {error}") from error
    if name == "latents":
        return _latents(given)
    if name == "copy_detection":
        assert options.path is not None
        return CopyDetectionFeatures.load(options.path)
    if name == "clip":
        if (options.path is None) == (options.pretrained is None):
            raise ValueError(
                "--features clip needs either --extractor.path or --extractor.pretrained"
            )
        return _clip({**given, "model": options.model or "ViT-B-32"})
    if options.model is None:
        raise ValueError("--features timm needs --extractor.model")
    if options.pretrained not in (None, "true", "false"):
        raise ValueError("--extractor.pretrained is true or false with --features timm")
    return _timm({**given, "pretrained": options.pretrained == "true"})


def features_from(
    description: dict[str, Any],
    tensors: dict[str, Tensor],
    weights: Path | None = None,
    trust_file: bool = False,
) -> Features:
    """Make the extractor again that ``describe()`` and ``tensors()`` came from.

    Only extractors of this package are made, by name; nothing of the description is executed. A
    TorchScript file that it names is trusted no more than any other.

    Args:
        description: what ``Features.describe`` returned, for instance from a manifest.
        tensors: what ``Features.tensors`` returned.
        weights: where the file or folder of the weights is now, if it was moved.
        trust_file: see ``SSCDFeatures``.

    Raises:
        FileNotFoundError: the weights are not where the description says.
        ValueError: the name is unknown, or the description is not what this version would write
            (other preprocessing or other weights), so distances would not be comparable.
    """
    name = description.get("name")
    where = description if weights is None else {**description, "path": str(weights)}
    try:
        features = _made(name, where, tensors, weights, trust_file)
    except (KeyError, TypeError) as error:
        raise ValueError(f"the description of {name} features is damaged: {error}") from error
    if identity(features.describe()) != identity(description):
        raise ValueError(
            f"features {name!r} were made with other preprocessing or weights than this version's; "
            "build the index again"
        )
    return features


def _made(
    name: Any,
    description: dict[str, Any],
    tensors: dict[str, Tensor],
    weights: Path | None,
    trust_file: bool,
) -> Features:
    if name == "pixels":
        return PixelFeatures()
    if name == "efficientnet-lite0":
        return EfficientNetFeatures()
    if name == "whitened":
        base = description.get("base")
        if not isinstance(base, dict) or base.get("name") == "whitened":
            raise ValueError("whitened features name no extractor that they were made from")
        return Whitened.from_tensors(features_from(base, {}, weights, trust_file), tensors)
    if name == "sscd":
        return _sscd({**description, "preprocessing": description["preset"]}, trust_file)
    if name in ("clip", "timm"):
        with _cached_repositories(description):
            return (_clip if name == "clip" else _timm_described)(description)
    if name == "copy-detection":
        return CopyDetectionFeatures.from_description(description, tensors)
    if name == "vae-latents":
        if description["path"] is None:
            raise ValueError(
                "the index does not say where its VAE is: name its folder, "
                "ReferenceIndex.load(folder, weights=...)"
            )
        return _latents(description)
    raise ValueError(
        f"unknown feature extractor {name!r}; this version has pixels, efficientnet-lite0, sscd, "
        "clip, timm, vae-latents, copy-detection and whitened"
    )


def _sscd(fields: dict[str, Any], trust_file: bool) -> Features:
    names = ("path", "model", "preprocessing", "dtype")
    return SSCDFeatures(**{name: fields[name] for name in names}, trust_file=trust_file)


def _clip(fields: dict[str, Any]) -> Features:
    return CLIPFeatures(**{name: fields[name] for name in ("model", "pretrained", "path", "dtype")})


def _timm(fields: dict[str, Any]) -> Features:
    names = ("model", "path", "pretrained", "seed", "dtype")
    return TimmFeatures(**{name: fields[name] for name in names})


def _timm_described(description: dict[str, Any]) -> Features:
    return _timm({**description, "seed": description["seed"] or 0})


@contextmanager
def _cached_repositories(description: dict[str, Any]) -> Iterator[None]:
    """Take a repository that an index names (``hf-hub:…``) from the hub's cache only.

    The user did not name it. The hub's own switch, HF_HUB_OFFLINE, is read when it is imported.

    Raises:
        ValueError: it is not in the cache.
    """
    model = str(description["model"])
    if ":" not in model:
        yield
        return
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


def _latents(fields: dict[str, Any]) -> Features:
    return LatentFeatures.from_folder(fields["path"], fields["dtype"])
