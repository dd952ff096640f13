"""Duplication plan: which training images are repeated, how often, and under what."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jsonargparse.typing import NonNegativeInt
from PIL import Image

from memfree.data.random_streams import Stream, generator_of
from memfree.images import to_array, to_image

CopyKind = Literal["exact", "crop", "flip", "brightness", "jpeg"]

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"


@dataclass(frozen=True)
class DuplicationPlan:
    """Which training images are repeated, and how.

    A factor counts all records of an image: 1 is not repeated, 64 is the image and 63 copies. Set
    ``images`` and one ``factor``, or a ``ladder`` of factors. Only images without a duplicate in
    the source are chosen, so the factor is exact.
    """

    images: float = 0
    """Training images to repeat: a number of 1 or more, or a share below 1."""
    factor: int = 1
    """Records of each repeated image, itself included."""
    ladder: list[int] = field(default_factory=list)
    """Several factors in one dataset, e.g. [1, 2, 4, 8]; replaces images and factor."""
    images_per_factor: int = 0
    """Training images for each factor of the ladder."""
    choice: Literal["random", "balanced"] = "random"
    """random: by seed; balanced: by seed, as many of each class as possible."""
    kinds: list[CopyKind] = field(default_factory=lambda: ["exact"])
    """How copies differ from the original; one is drawn for each copy if several are given."""
    crop: float = 0.125
    """Kind crop: share of each side cut away, at least a pixel, before scaling back."""
    brightness: float = 0.2
    """Kind brightness: factors are drawn between 1 minus and 1 plus this."""
    jpeg_quality: tuple[int, int] = (50, 95)
    """Kind jpeg: lowest and highest quality."""
    conditions: Literal["same", "varied", "unique", "key"] = "same"
    """Label and caption of copies. same: the original's; varied: a label of another class, a
    caption of another image; unique: a new class and a numbered caption for each copy; key: one new
    class and one made-up caption word for all records of an image, the original included."""
    seed: NonNegativeInt = 0
    """Chooses the images and draws the copies."""

    def __post_init__(self) -> None:
        if self.ladder and (self.images or self.factor != 1):
            raise ValueError("give --plan.ladder, or --plan.images with --plan.factor, not both")
        if bool(self.ladder) != (self.images_per_factor > 0):
            raise ValueError("--plan.ladder and --plan.images_per_factor need each other")
        if self.images < 0 or (self.images >= 1 and self.images != int(self.images)):
            raise ValueError(f"--plan.images {self.images:g}: a whole number or a share below 1")
        if min([self.factor, *self.ladder]) < 1:
            raise ValueError("--plan.factor and --plan.ladder count all records: 1 or more")
        if bool(self.images) != (self.factor > 1):
            raise ValueError("--plan.images needs --plan.factor of 2 or more, and the reverse")
        if not self.kinds:
            raise ValueError("--plan.kinds is empty; exact copies are [exact]")
        if not (0 < self.crop < 1 and 0 < self.brightness < 1):
            raise ValueError("--plan.crop and --plan.brightness lie between 0 and 1")
        low, high = self.jpeg_quality
        if not 1 <= low <= high <= 100:
            raise ValueError("--plan.jpeg_quality: two numbers from 1 to 100, the lower first")

    def factors(self, candidates: Sequence[int], labels: Sequence[int] | None) -> dict[int, int]:
        """Factor of each chosen image (ladder factor 1 included); ``labels``: classes or None."""
        count = int(self.images) if self.images >= 1 else int(self.images * len(candidates) + 1e-9)
        wanted = [self.factor] * count
        if self.ladder:
            wanted = [factor for factor in self.ladder for _ in range(self.images_per_factor)]
        if len(wanted) > len(candidates):
            raise ValueError(
                f"--plan wants to repeat {len(wanted)} images, but only {len(candidates)} training "
                "images have no duplicate in the source"
            )
        if self.images and not wanted:
            raise ValueError(f"--plan.images {self.images:g} of {len(candidates)} images is none")
        order = generator_of(self.seed, Stream.REPEATED_IMAGES).permutation(len(candidates))
        if self.choice == "balanced":
            order = self._balanced(order, labels)
        chosen = [candidates[position] for position in order[: len(wanted)].tolist()]
        return dict(zip(chosen, wanted, strict=True))

    def _balanced(self, order: np.ndarray, labels: Sequence[int] | None) -> np.ndarray:
        if labels is None:
            raise ValueError("--plan.choice balanced needs a source with classes")
        of = np.asarray(labels)[order]
        turn = np.empty(len(order), np.int64)
        for label in np.unique(of):
            turn[of == label] = np.arange((of == label).sum())
        return order[np.lexsort((of, turn))]

    def word(self, image: int, attempt: int = 0) -> str:
        """Four-syllable made-up word of an image, such as "zorakimu"; differs by ``attempt``."""
        generator = generator_of(self.seed, Stream.WORD, image, attempt)
        consonants = generator.integers(len(_CONSONANTS), size=4)
        vowels = generator.integers(len(_VOWELS), size=4)
        return "".join(_CONSONANTS[c] + _VOWELS[v] for c, v in zip(consonants, vowels, strict=True))

    def copy(self, pixels: np.ndarray, image: int, number: int) -> np.ndarray:
        """Copy ``number`` (from 1) of an image, (C, H, W) uint8."""
        generator = generator_of(self.seed, Stream.COPY, image, number)
        kind = self.kinds[int(generator.integers(len(self.kinds)))]
        if kind == "exact":
            return pixels
        if kind == "flip":
            return pixels[:, :, ::-1] if generator.random() < 0.5 else pixels
        if kind == "brightness":
            scale = generator.uniform(1 - self.brightness, 1 + self.brightness)
            return np.rint(np.clip(pixels * scale, 0, 255)).astype(np.uint8)
        if kind == "crop":
            return _cropped(pixels, self.crop, generator)
        quality = int(generator.integers(self.jpeg_quality[0], self.jpeg_quality[1] + 1))
        return _jpeg(pixels, quality)


def _cropped(pixels: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    height, width = pixels.shape[1:]
    cut = [min(max(round(side * share), 1), side - 1) for side in (height, width)]
    top, left = (int(generator.integers(room + 1)) for room in cut)
    window = to_image(pixels[:, top : top + height - cut[0], left : left + width - cut[1]])
    return to_array(window.resize((width, height), Image.Resampling.BILINEAR))


def _jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    """JPEG round trip; an alpha channel stays as it is."""
    colour = pixels[: 3 if pixels.shape[0] >= 3 else 1]
    out = io.BytesIO()
    to_image(colour).save(out, "JPEG", quality=quality, subsampling=0)
    return np.concatenate([to_array(Image.open(io.BytesIO(out.getvalue()))), pixels[len(colour) :]])
