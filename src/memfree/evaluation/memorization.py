"""Memorization metrics: copies, duplicated images, and what the measures can see.

``conditions`` are numbers of ``shared_conditions``, one a sample: intervals are then over them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.io import decode_jpeg, encode_jpeg
from torchvision.transforms.functional import gaussian_blur

from memfree.data.split import MIN_EXPECTED
from memfree.evaluation.inputs import Inputs, Second, Subject
from memfree.evaluation.intervals import (
    Interval,
    conditions_detail,
    paired_rate_difference,
    quantile_interval,
    rate_interval,
    rate_ratio,
    shared_conditions,
    weighted_rate,
)
from memfree.evaluation.metrics import (
    CHANGED,
    COPIES_AT,
    COPIES_OF_FACTOR,
    HELDOUT,
    Metric,
    metric,
    rate_metric,
)
from memfree.evaluation.neighbours import Neighbours, second_metric
from memfree.guidance import NormalizedL2
from memfree.images import from_bytes, to_bytes

PAPER_THRESHOLDS = (1.4, 1.6)
"""Fixed thresholds on nL2 that the AMG paper reports for CIFAR-10."""
GU_RATIO = 1 / 3  # Gu et al. call a sample memorized where d_1/d_2 is below this


def memorization_metrics(
    inputs: Inputs,
    subjects: dict[str, Subject],
    second: Second,
    rates: tuple[float, ...],
    seed: int,
) -> list[Metric]:
    """Copies by both measures, distances, dose-response, and the share of duplicated images.

    The first of the false-positive rates is that of the verdicts; others that are too small for the
    calibration images are left out.
    """
    calibration, index, rate = inputs.calibration, inputs.index, rates[0]
    supported = allowed_rates(rates[1:], len(calibration.sigmas))
    thresholds = {each: calibration.threshold(each) for each in (rate, *supported)}
    per_factor = images_per_factor(
        index.group.cpu().numpy(), index.group_multiplicity.cpu().numpy()
    )
    measure, heldout = inputs.similarity, subjects[HELDOUT]
    nl2, real = isinstance(measure, NormalizedL2), heldout.found.multiplicity > 1
    metrics: list[Metric] = []
    for name, subject in subjects.items():
        found, shared = subject.found, subject.conditions
        repeated = found.multiplicity > 1
        weights = class_weights(heldout.labels, subject.labels, len(real))
        metrics += [
            *copy_metrics(
                name, found, thresholds, rate, measure.name, shared, calibration.rate_limits
            ),
            second_metric(second.similarity, name, subject.second_copy, rate, shared),
            *distance_metrics(name, found, nl2, shared),
            *factor_metrics(name, found, per_factor, shared),
            *duplicated_share_metrics(name, repeated, real, weights, seed, shared),
        ]
    return metrics


def copy_metrics(
    subject: str,
    found: Neighbours,
    thresholds: dict[float, float],
    main_rate: float,
    similarity: str,
    conditions: np.ndarray | None = None,
    rate_limits: Callable[[float], tuple[float, float]] | None = None,
) -> list[Metric]:
    """Rates of copies, above the threshold in σ of each false-positive rate."""
    metrics = []
    for rate, threshold in thresholds.items():
        name = "copies" if rate == main_rate else f"{COPIES_AT}{rate:g}"
        copies = found.sigma > threshold
        detail: dict[str, Any] = {"similarity": similarity, "threshold": threshold}
        detail["false_positive_rate"] = rate
        if rate_limits is not None:
            detail["false_positive_rate_limits"] = [*rate_limits(rate)]
        detail["copies"] = int(copies.sum())
        metrics.append(rate_metric(name, subject, copies, conditions, **detail))
    return metrics


def distance_metrics(
    subject: str, found: Neighbours, nl2: bool, conditions: np.ndarray | None = None
) -> list[Metric]:
    """The paper's metrics of nL2 = −σ, only with ``nl2``; and d_1/d_2 < 1/3."""
    n, metrics, over = len(found), [], conditions_detail(conditions)
    if nl2:
        distances = -found.sigma
        percentile = quantile_interval(distances, 0.05, conditions, at_least=0.0)
        metrics += [
            metric("nl2_5th_percentile", subject, percentile, n, **over),
            metric("nl2_minimum", subject, float(distances.min()), n),
        ]
        for limit in PAPER_THRESHOLDS:
            name, below = f"nl2_below_{limit:g}", distances < limit
            metrics.append(rate_metric(name, subject, below, conditions, threshold=limit))
    name, close = "distance_ratio_below_third", found.distance_ratio < GU_RATIO
    return [*metrics, rate_metric(name, subject, close, conditions, threshold=GU_RATIO)]


def factor_metrics(
    subject: str,
    found: Neighbours,
    images_per_factor: dict[int, int],
    conditions: np.ndarray | None = None,
) -> list[Metric]:
    """Copies per duplication factor: the dose-response curve.

    ``copies_of_factor_f`` is the rate of samples that are copies and whose nearest group has f
    records; ``copies_per_image_of_factor_f`` is how many copies an image of that factor has.
    """
    n, metrics = len(found), []
    for factor, images in sorted(images_per_factor.items()):
        copies = found.copy & (found.multiplicity == factor)
        detail = {"factor": factor, "images": images, "copies": int(copies.sum())}
        rate = rate_interval(copies, conditions)
        scale = n / images
        each = Interval(rate.value * scale, *(end * scale for end in rate.bounds))
        for name, interval in (("copies_of_factor_", rate), (COPIES_OF_FACTOR, each)):
            over = {**detail, **conditions_detail(conditions)}
            metrics.append(metric(f"{name}{factor}", subject, interval, n, **over))
    return metrics


def images_per_factor(groups: np.ndarray, group_multiplicity: np.ndarray) -> dict[int, int]:
    """How many groups of the training set have each multiplicity, from both of each reference."""
    first = np.unique(groups, return_index=True)[1]
    factors, counts = np.unique(group_multiplicity[first], return_counts=True)
    return dict(zip(factors.tolist(), counts.tolist(), strict=True))


def class_weights(own: np.ndarray | None, wanted: np.ndarray | None, n: int) -> np.ndarray:
    """Weights (n,) that give held-out images with labels ``own`` the class mix ``wanted``.

    Classes without a held-out image (as a duplication plan may make up for its copies) are left out
    of the mix. Without labels of either, or none in common, all weights are 1.
    """
    if own is None or wanted is None or not np.isin(own, wanted).any():
        return np.ones(n)
    weights = np.zeros(n)
    for label, count in zip(*np.unique(wanted, return_counts=True), strict=True):
        members = own == label
        if members.any():
            weights[members] = count / len(wanted) / members.sum()
    return weights


def duplicated_share_metrics(
    subject: str,
    duplicated: np.ndarray,
    heldout: np.ndarray,
    weights: np.ndarray,
    seed: int,
    conditions: np.ndarray | None = None,
) -> list[Metric]:
    """Share of samples whose nearest image is of a duplicated group, beside its expected share.

    The expected share (``duplicated_fair_share`` in files) is that of real images that were never
    trained on, at the samples' class mix (``weights`` of ``class_weights``); a model that has not
    learnt the duplication has it too.
    """
    expected = weighted_rate(heldout, weights)
    metrics = [
        rate_metric("duplicated_share", subject, duplicated, conditions),
        metric("duplicated_fair_share", subject, expected, len(heldout)),
    ]
    if expected.value > 0:
        ratio = rate_ratio(duplicated, heldout, weights, seed, conditions)
        over = conditions_detail(conditions)
        metrics.append(metric("duplicated_share_ratio", subject, ratio, len(duplicated), **over))
    return metrics


def comparison_metrics(inputs: Inputs, subjects: dict[str, Subject]) -> list[Metric]:
    """Differences to the reference over samples that began with the same noise."""
    metrics: list[Metric] = []
    group = inputs.index.group.cpu().numpy()
    for name, reference in inputs.paired.items():
        own, other = subjects[name], subjects[reference]
        flags = {
            "copies": (own.found.copy, other.found.copy),
            "second_copies": (own.second_copy, other.second_copy),
            "duplicated_share": (own.found.multiplicity > 1, other.found.multiplicity > 1),
        }
        shared: dict[str, np.ndarray | None] = dict.fromkeys(flags, own.conditions)
        if own.agrees is not None and other.agrees is not None:
            flags["class_agreement"] = (own.agrees, other.agrees)
            shared["class_agreement"] = own.agrees_conditions
        metrics += paired_metrics(name, reference, flags, shared)
        groups = group[own.found.row], group[other.found.row]
        metrics += same_image_metrics(
            name, reference, *groups, other.found.copy, own.labels, own.conditions
        )
    return metrics


def paired_metrics(
    subject: str,
    reference: str,
    flags: dict[str, tuple[np.ndarray, np.ndarray]],
    conditions: Mapping[str, np.ndarray | None] | None = None,
) -> list[Metric]:
    """Differences of rates, by metric (subject's flags, reference's flags) of the same noise."""
    metrics = []
    for name, (own, others) in flags.items():
        shared = (conditions or {}).get(name)
        difference = paired_rate_difference(own, others, clusters=shared)
        detail = {"reference": reference, "method": "Newcombe, paired", **conditions_detail(shared)}
        metrics.append(metric(f"{name}_difference", subject, difference, len(own), **detail))
    return metrics


def same_image_metrics(
    subject: str,
    reference: str,
    group: np.ndarray,
    reference_group: np.ndarray,
    reference_copy: np.ndarray,
    labels: np.ndarray | None,
    conditions: np.ndarray | None = None,
) -> list[Metric]:
    """Of noises that become a copy unguided: how many stay nearest to the same image, guided.

    A guidance that stops just past its own threshold leaves the same picture; this sees it without
    any threshold. ``group`` and ``reference_group`` (n,) are the groups of the nearest training
    images, ``labels`` the classes of the samples: the chance level is that of *other* noises of the
    same class. Nothing is returned where the reference has no copies.
    """
    if not reference_copy.any():
        return []
    same = (group == reference_group)[reference_copy]
    pools = np.zeros(len(group), dtype=np.int64) if labels is None else labels
    expected = []
    for i in np.flatnonzero(reference_copy):
        others = pools == pools[i]
        others[i] = False
        if others.any():
            expected.append(float((group[others] == reference_group[i]).mean()))
    shared = None if conditions is None else shared_conditions(conditions[reference_copy])
    metrics = [rate_metric("same_image", subject, same, shared, reference=reference)]
    if expected:
        chance = float(np.mean(expected))
        metrics.append(metric("same_image_chance", subject, chance, len(expected)))
    return metrics


def allowed_rates(wanted: Sequence[float], calibration_images: int) -> list[float]:
    """The false-positive rates that n calibration images can support: at least 5/n."""
    return [rate for rate in wanted if rate * calibration_images >= MIN_EXPECTED - 1e-9]


CHANGED_IMAGES = 100  # training images that are changed, at most


def known_copy_metrics(inputs: Inputs, second: Second, rate: float, seed: int) -> list[Metric]:
    """Share of known copies, training images changed on purpose, that either measure finds."""
    images = next(iter(inputs.dataset.part("train").batches(CHANGED_IMAGES)))
    metrics = []
    for name, changed in changed_copies(images, seed).items():
        first = inputs.neighbours(changed, rate).copy
        other = second.judge(changed, second.viewer(changed), rate)[1]
        metrics += [
            rate_metric(f"copies_of_{name}", CHANGED, first),
            rate_metric(f"second_copies_of_{name}", CHANGED, other),
        ]
    return metrics


def changed_copies(images: Tensor, seed: int) -> dict[str, Tensor]:
    """Known copies of images (n, C, H, W) in [-1, 1], from hardly to clearly changed, by name.

    A false-positive rate says nothing of a measure that finds no copy at all; the share of these
    that it finds does.
    """
    generator = torch.Generator().manual_seed(seed)

    def noisy(deviation: float) -> Tensor:
        noise = torch.randn(images.shape, generator=generator)
        return (images + deviation * noise).clamp(-1, 1)

    return {
        "noise_0.05": noisy(0.05),
        "noise_0.1": noisy(0.1),
        "noise_0.2": noisy(0.2),
        "darker_20": 0.8 * (images + 1) - 1,
        "shifted_1": torch.roll(images, 1, -1),
        "mirrored": images.flip(-1),
        "cropped_12": _cropped(images, 0.125),
        "jpeg_50": _jpeg(images, 50),
        "blurred": _blurred(images, 1.0),
    }


def _cropped(images: Tensor, share: float) -> Tensor:
    height, width = images.shape[-2:]
    top, left = (max(1, round(side * share / 2)) for side in (height, width))
    window = images[..., top : height - top, left : width - left]
    return functional.interpolate(window, size=(height, width), mode="bilinear").clamp(-1, 1)


def _jpeg(images: Tensor, quality: int) -> Tensor:
    # Channels beyond colour stay as they are.
    colour = 3 if images.shape[1] >= 3 else 1
    bytes_ = to_bytes(images[:, :colour]).cpu()
    changed = torch.stack([decode_jpeg(encode_jpeg(image, quality)) for image in bytes_])
    return torch.cat([from_bytes(changed.to(images.device)).to(images), images[:, colour:]], 1)


def _blurred(images: Tensor, deviation: float) -> Tensor:
    radius = min(3, *(side - 1 for side in images.shape[-2:]))
    return gaussian_blur(images, [2 * radius + 1] * 2, [deviation] * 2)
