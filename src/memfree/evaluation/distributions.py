"""Sample folders beside the test images, in every feature space at hand, and their diversity."""

from __future__ import annotations

from typing import Any

import numpy as np

from memfree.evaluation import quality
from memfree.evaluation.diversity import diversity_metrics
from memfree.evaluation.embedding import View, fit_components
from memfree.evaluation.inputs import Inputs
from memfree.evaluation.manifold import manifold_metrics
from memfree.evaluation.measuring import Second
from memfree.evaluation.metrics import HELDOUT, Metric
from memfree.evaluation.subject import Subject


def distribution_metrics(
    inputs: Inputs, subjects: dict[str, Subject], second: Second, seed: int
) -> list[Metric]:
    """Fréchet distances, KID, precision and recall to the test images; diversity of either.

    All at equal counts; held out are training images against test images, for diversity the test
    images.
    """
    groups = np.unique(np.array(inputs.dataset.part("train").groups), return_index=True)[1]
    floor = second.train_view.take(np.sort(groups))  # one image of every group
    target = subjects[HELDOUT].view
    views = {name: subjects[name].view for name in inputs.samples}
    components = fit_components(second.fit_view.pooled)
    shared = {name: subjects[name].conditions for name in inputs.samples}

    def projected(view: View) -> np.ndarray:
        return components.transform(view.pooled.astype(np.float64))

    def pixels(view: View) -> np.ndarray:
        return view.pixels.astype(np.float64)

    metrics: list[Metric] = []
    for space, features, detail in (
        ("efficientnet", projected, second.viewer.describe_pooled()),
        ("pixels", pixels, second.viewer.describe_pixels()),
    ):
        metrics += quality.frechet_metrics(
            space,
            {name: features(view) for name, view in views.items()},
            features(floor),
            features(target),
            seed,
            inputs.paired,
            conditions=shared,
            **detail,
        )
    metrics += quality.kid_metrics(
        "efficientnet",
        {name: view.pooled for name, view in views.items()},
        floor.pooled,
        target.pooled,
        seed,
        conditions=shared,
        **second.viewer.describe_pooled(),
    )
    spread = {name: projected(view) for name, view in views.items()}
    described = second.viewer.describe_pooled()
    metrics += manifold_metrics(
        "efficientnet", spread, projected(floor), projected(target), seed, shared, **described
    )
    metrics += diversity_metrics(
        "efficientnet",
        {**spread, HELDOUT: projected(target)},
        seed,
        conditions=shared,
        **described,
    )
    if target.inception is not None:
        metrics += _inception_metrics(views, floor, target, seed, shared)
    return metrics


def _inception_metrics(
    views: dict[str, View],
    floor: View,
    target: View,
    seed: int,
    conditions: dict[str, np.ndarray | None],
) -> list[Metric]:
    """FID and KID as published, on torch-fidelity's Inception; singular below 2048 images."""

    def features(view: View) -> np.ndarray:
        assert view.inception is not None
        return view.inception

    subjects = {name: features(view) for name, view in views.items()}
    detail: dict[str, Any] = {"extractor": "torch-fidelity inception-v3-compat, 2048"}
    double = {name: each.astype(np.float64) for name, each in subjects.items()}
    return [
        *quality.frechet_metrics(
            "inception",
            double,
            features(floor).astype(np.float64),
            features(target).astype(np.float64),
            seed,
            draws=0,
            **detail,
        ),
        *quality.kid_metrics(
            "inception",
            subjects,
            features(floor),
            features(target),
            seed,
            conditions=conditions,
            **detail,
        ),
    ]
