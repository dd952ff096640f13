"""What an evaluation knows of one set of images, image by image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from memfree.evaluation.embedding import View
    from memfree.evaluation.neighbours import Neighbours


@dataclass
class Subject:
    """A sample folder, or the test images, with what was found of each of the n images."""

    name: str
    found: Neighbours
    view: View
    labels: np.ndarray | None
    """(n,) the class that was asked for; of test images, their own."""
    second_sigma: np.ndarray
    """(n,) the second similarity."""
    second_copy: np.ndarray
    """(n,) bool: its verdict."""
    conditions: np.ndarray | None = None
    """(n,) of ``shared_conditions``: number of the caption that a sample was asked for, where
    several share one; None for independent images, as test images are, and samples of classes."""
    captions: list[str] | None = None
    """The n captions that samples were asked for."""
    agrees: np.ndarray | None = None
    """(≤ n,) bool: the classifier sees the class that was asked for; without the samples of classes
    that it does not know."""
    agrees_conditions: np.ndarray | None = None
    """(≤ n,) of ``shared_conditions``, of the samples of ``agrees``."""


DEFAULT_REFERENCE = "unguided"
"""Samples that others are compared with; where there are none of this name, the first."""
