"""How many held-out images a false-positive rate needs, said before it is too late."""

from __future__ import annotations

import math

MIN_EXPECTED = 5
"""A false-positive rate needs so many calibration images expected above its threshold."""
DEFAULT_RATE = 0.01
"""False-positive rate where none is given."""


def too_few_images(images: int) -> str | None:
    """One line where so many calibration images do not allow the default false-positive rate.

    Args:
        images: in the calibration part.

    Returns:
        What is missing and which rate can be used instead; None where the default rate can.
    """
    needed = math.ceil(MIN_EXPECTED / DEFAULT_RATE - 1e-9)
    if images >= needed:
        return None
    line = (
        f"a false-positive rate of {100 * DEFAULT_RATE:g} % needs {needed} calibration images; "
        f"there {'is' if images == 1 else 'are'} {images}"
    )
    if images <= MIN_EXPECTED:
        return f"{line}, too few for any rate: prepare more with --parts.calibration"
    smallest = smallest_rate(images)
    return (
        f"{line}: the smallest rate is {100 * smallest:g} %, use "
        f"memfree evaluate --false_positive_rate {smallest:g} and "
        f"sample.py --guidance.false_positive_rate {smallest:g}"
    )


def smallest_rate(images: int) -> float:
    """The smallest false-positive rate for so many images, rounded up so that it is accepted."""
    return math.ceil(1e4 * MIN_EXPECTED / images - 1e-9) / 1e4
