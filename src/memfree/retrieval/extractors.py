"""Make a feature extractor again from what an index folder says of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from memfree.retrieval.efficientnet import EfficientNetFeatures
from memfree.retrieval.features import Features, PixelFeatures
from memfree.retrieval.whitening import Whitened


def features_from(description: dict[str, Any], tensors: dict[str, Tensor]) -> Features:
    """Make the extractor again that ``describe()`` and ``tensors()`` came from.

    Only extractors of this package are made, by name; nothing of the description is executed.

    Args:
        description: what ``Features.describe`` returned, for instance from a manifest.
        tensors: what ``Features.tensors`` returned.

    Raises:
        ValueError: the name is unknown, or the description is not what this version would write
            (other preprocessing or other weights), so distances would not be comparable.
    """
    name = description.get("name")
    features: Features
    if name == "pixels":
        features = PixelFeatures()
    elif name == "efficientnet-lite0":
        features = EfficientNetFeatures()
    elif name == "whitened":
        base = description.get("base")
        if not isinstance(base, dict) or base.get("name") == "whitened":
            raise ValueError("whitened features name no extractor that they were made from")
        features = Whitened.from_tensors(features_from(base, {}), tensors)
    else:
        raise ValueError(
            f"unknown feature extractor {name!r}; this version has pixels, efficientnet-lite0 "
            "and whitened"
        )
    if features.describe() != description:
        raise ValueError(
            f"features {name!r} were made with other preprocessing or weights than this version's; "
            "build the index again"
        )
    return features
