"""Memorization metrics: copies, duplicated images, and what the measures can see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.io import decode_jpeg, encode_jpeg
from torchvision.transforms.functional import gaussian_blur

from memfree.data.split import MIN_EXPECTED
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
from memfree.evaluation.metrics import Metric, metric
from memfree.evaluation.neighbours import Neighbours
from memfree.images import from_bytes, to_bytes

PAPER_THRESHOLDS = (1.4, 1.6)
"""Fixed thresholds on nL2 that the AMG paper reports for CIFAR-10."""
GU_RATIO = 1 / 3
"""Gu et al. call a sample memorized where d_1/d_2 is below this."""


def copy_metrics(
    subject: str,
    found: Neighbours,
    thresholds: dict[float, float],
    main_rate: float,
    similarity: str,
    conditions: np.ndarray | None = None,
    rate_limits: Callable[[float], tuple[float, float]] | None = None,
) -> list[Metric]:
    """Rates of copies under the calibrated thresholds, each with its interval.

    Args:
        subject: name in the metrics.
        found: the images' neighbours.
        thresholds: false-positive rate to threshold in σ; copies lie above it.
        main_rate: the false-positive rate whose metric is called plainly ``copies``.
        similarity: name of the measure, for the detail.
        conditions: (n,) of ``shared_conditions``.
        rate_limits: between which limits the share of real images above the threshold of a
            false-positive rate lies; for the detail.
    """
    metrics = []
    for rate, threshold in thresholds.items():
        name = "copies" if rate == main_rate else f"copies_at_{rate:g}"
        copies = found.sigma > threshold
        limits = None if rate_limits is None else rate_limits(rate)
        metrics.append(
            metric(
                name,
                subject,
                rate_interval(copies, conditions),
                len(found),
                similarity=similarity,
                threshold=threshold,
                false_positive_rate=rate,
                **({} if limits is None else {"false_positive_rate_limits": [*limits]}),
                copies=int(copies.sum()),
                **conditions_detail(conditions),
            )
        )
    return metrics


def distance_metrics(
    subject: str, found: Neighbours, nl2: bool, conditions: np.ndarray | None = None
) -> list[Metric]:
    """The paper's nL2 figures, and d_1/d_2 < 1/3.

    Args:
        subject: name in the metrics.
        found: the images' neighbours.
        nl2: whether σ is −nL2; without it only the distance ratio is reported.
        conditions: (n,) of ``shared_conditions``.
    """
    n, metrics, over = len(found), [], conditions_detail(conditions)
    if nl2:
        distances = -found.sigma
        percentile = quantile_interval(distances, 0.05, conditions, at_least=0.0)
        metrics += [
            metric("nl2_5th_percentile", subject, percentile, n, **over),
            metric("nl2_minimum", subject, float(distances.min()), n),
        ]
        for limit in PAPER_THRESHOLDS:
            below = rate_interval(distances < limit, conditions)
            metrics.append(
                metric(f"nl2_below_{limit:g}", subject, below, n, threshold=limit, **over)
            )
    close = rate_interval(found.distance_ratio < GU_RATIO, conditions)
    name = "distance_ratio_below_third"
    metrics.append(metric(name, subject, close, n, threshold=GU_RATIO, **over))
    return metrics


def factor_metrics(
    subject: str,
    found: Neighbours,
    images_per_factor: dict[int, int],
    conditions: np.ndarray | None = None,
) -> list[Metric]:
    """Copies per duplication factor: the dose-response curve.

    For each factor f two metrics: ``copies_of_factor_f``, the rate of samples that are copies and
    whose nearest group has f records; and ``copies_per_image_of_factor_f``, how many copies an
    image of that factor got on average.

    Args:
        subject: name in the metrics.
        found: the images' neighbours.
        images_per_factor: factor to the number of groups of the training set that have it.
        conditions: (n,) of ``shared_conditions``.
    """
    n, metrics = len(found), []
    for factor, images in sorted(images_per_factor.items()):
        copies = found.copy & (found.multiplicity == factor)
        rate = rate_interval(copies, conditions)
        scale = n / images
        assert rate.low is not None and rate.high is not None
        each = Interval(rate.value * scale, rate.low * scale, rate.high * scale)
        detail = {"factor": factor, "images": images, "copies": int(copies.sum())}
        detail |= conditions_detail(conditions)
        metrics += [
            metric(f"copies_of_factor_{factor}", subject, rate, n, **detail),
            metric(f"copies_per_image_of_factor_{factor}", subject, each, n, **detail),
        ]
    return metrics


def images_per_factor(groups: np.ndarray, group_multiplicity: np.ndarray) -> dict[int, int]:
    """How many groups of the training set have each multiplicity.

    Args:
        groups: (rows,) group number of each reference.
        group_multiplicity: (rows,) records of its group.
    """
    _, first = np.unique(groups, return_index=True)
    factors, counts = np.unique(group_multiplicity[first], return_counts=True)
    return {int(f): int(c) for f, c in zip(factors, counts, strict=True)}


def class_weights(own: np.ndarray | None, wanted: np.ndarray | None, n: int) -> np.ndarray:
    """Weights that give held-out images the class mix of the samples.

    Classes of the samples without a held-out image (those that a duplication plan made up for its
    copies, for instance) are left out of the mix.

    Args:
        own: (n,) labels of the held-out images, None without labels.
        wanted: labels of the samples, None where they are unconditional.
        n: number of held-out images.

    Returns:
        (n,) non-negative weights; all ones where either side has no labels, or none in common.
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
    """Share of samples whose nearest image is of a duplicated group, beside its fair share.

    The fair share is what real images that were never trained on have, at the samples' class mix;
    a model that has not learnt the duplication has it too.

    Args:
        subject: name in the metrics.
        duplicated: (n,) bool per sample: the nearest group has more than one record.
        heldout: (m,) bool per test image, likewise.
        weights: (m,) of the test images, from ``class_weights``.
        seed: of the ratio's posterior draws.
        conditions: (n,) of ``shared_conditions``, of the samples.
    """
    n, over = len(duplicated), conditions_detail(conditions)
    share = rate_interval(duplicated, conditions)
    fair = weighted_rate(heldout, weights)
    metrics = [
        metric("duplicated_share", subject, share, n, **over),
        metric("duplicated_fair_share", subject, fair, len(heldout)),
    ]
    if fair.value > 0:
        ratio = rate_ratio(duplicated, heldout, weights, seed, conditions)
        metrics.append(metric("duplicated_share_ratio", subject, ratio, n, **over))
    return metrics


def paired_metrics(
    subject: str,
    reference: str,
    flags: dict[str, tuple[np.ndarray, np.ndarray]],
    conditions: Mapping[str, np.ndarray | None] | None = None,
) -> list[Metric]:
    """Differences of rates between two subjects that start from the same noise.

    Args:
        subject: the guided one.
        reference: the one subtracted.
        flags: metric name to (subject's flags, reference's flags), each (n,) bool.
        conditions: metric name to (n,) of ``shared_conditions``.
    """
    metrics = []
    for name, (own, others) in flags.items():
        shared = (conditions or {}).get(name)
        metrics.append(
            metric(
                f"{name}_difference",
                subject,
                paired_rate_difference(own, others, clusters=shared),
                len(own),
                reference=reference,
                method="Newcombe, paired",
                **conditions_detail(shared),
            )
        )
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
    any threshold. The chance level is that of *other* noises of the same class.

    Args:
        subject: the guided one.
        reference: the unguided one of the same noise.
        group: (n,) group of the nearest reference of each guided sample.
        reference_group: (n,) the same unguided.
        reference_copy: (n,) bool, whether the unguided sample is a copy.
        labels: (n,) classes that were asked for; None if unconditional.
        conditions: (n,) of ``shared_conditions``.

    Returns:
        ``same_image`` and ``same_image_chance``; nothing where the reference has no copies.
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
    over = conditions_detail(shared)
    metrics = [
        metric(
            "same_image",
            subject,
            rate_interval(same, shared),
            len(same),
            reference=reference,
            **over,
        )
    ]
    if expected:
        chance = float(np.mean(expected))
        metrics.append(metric("same_image_chance", subject, chance, len(expected)))
    return metrics


def allowed_rates(wanted: Sequence[float], calibration_images: int) -> list[float]:
    """The false-positive rates that so many calibration images can support: at least 5/n."""
    return [rate for rate in wanted if rate * calibration_images >= MIN_EXPECTED - 1e-9]


CHANGED_IMAGES = 100
"""Training images that are changed, at most."""


def changed_copies(images: Tensor, seed: int) -> dict[str, Tensor]:
    """Known copies of training images, from hardly to clearly changed, by name.

    A false-positive rate says nothing of a measure that finds no copy at all; the share of these
    that it finds does.

    Args:
        images: (n, C, H, W) in [-1, 1].
        seed: of the noise.
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
    """The middle, without this share of each side, at the old size."""
    height, width = images.shape[-2:]
    top, left = (max(1, round(side * share / 2)) for side in (height, width))
    window = images[..., top : height - top, left : width - left]
    return functional.interpolate(window, size=(height, width), mode="bilinear").clamp(-1, 1)


def _jpeg(images: Tensor, quality: int) -> Tensor:
    """Through JPEG and back; channels beyond colour stay as they are."""
    colour = 3 if images.shape[1] >= 3 else 1
    bytes_ = to_bytes(images[:, :colour]).cpu()
    changed = torch.stack([decode_jpeg(encode_jpeg(image, quality)) for image in bytes_])
    return torch.cat([from_bytes(changed.to(images.device)).to(images), images[:, colour:]], 1)


def _blurred(images: Tensor, deviation: float) -> Tensor:
    """Gaussian blur of this standard deviation in pixels."""
    radius = min(3, *(side - 1 for side in images.shape[-2:]))
    return gaussian_blur(images, [2 * radius + 1] * 2, [deviation] * 2)
