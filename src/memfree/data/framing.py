"""Resize, crop and channels: how a source image of any size becomes one of the dataset's size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from memfree.data.decode import channels_of, to_array, upright, with_channels
from memfree.data.options import Filter, Resize
from memfree.data.wording import counted

_FILTERS = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Framing:
    """The one size and channel count that all images of a dataset are brought to.

    Nothing is changed silently: without a size, images of different sizes are refused, and
    without channels, images of different channel counts are.
    """

    height: int | None
    """Rows of pixels; None: whatever the first image has."""
    width: int | None
    """Columns of pixels; None: whatever the first image has."""
    channels: int | None
    """1 grey, 2 grey with alpha, 3 RGB, 4 RGBA; None: whatever the first image has."""
    resize: Resize = "crop"
    """crop: scale until it covers, keep the centre; squash: scale both sides; pad: scale, fit."""
    filter: Filter = "bicubic"
    """Interpolation, antialiased when it shrinks."""

    def fixed_by(self, image: Image.Image, name: str) -> Framing:
        """This framing with everything unset taken from the first image."""
        height, width, channels = self.height, self.width, self.channels
        if height is None or width is None:
            width, height = upright(image).size
        if channels is None:
            channels = channels_of(image, name)
        return Framing(height, width, channels, self.resize, self.filter)

    def apply(self, image: Image.Image, name: str, requested: Framing) -> np.ndarray:
        """Pixels (C, H, W) uint8 of one image.

        Args:
            image: any decoded image.
            name: what to call it in an error.
            requested: the framing as the user gave it, which says what may be converted.

        Raises:
            ValueError: size or channel count differ from the first image's, and the user did not
                ask for a conversion.
        """
        assert self.height is not None and self.width is not None and self.channels is not None
        found = channels_of(image, name)
        if requested.channels is None and found != self.channels:
            raise ValueError(
                f"{name}: {counted(found, 'channel')}, but the first image has {self.channels}; "
                f"convert all with --channels {self.channels}"
            )
        image = with_channels(upright(image), self.channels)
        if image.size == (self.width, self.height):
            return to_array(image)
        if requested.height is None:
            raise ValueError(
                f"{name}: {image.width} x {image.height} pixels, but the first image has "
                f"{self.width} x {self.height}; bring all to one size with --image_size"
            )
        return to_array(self._scaled(image))

    def _scaled(self, image: Image.Image) -> Image.Image:
        assert self.height is not None and self.width is not None
        kernel = _FILTERS[self.filter]
        size = (self.width, self.height)
        if self.resize == "squash":
            return image.resize(size, kernel)
        ratios = (self.width / image.width, self.height / image.height)
        scale = max(ratios) if self.resize == "crop" else min(ratios)
        scaled = image.resize(
            (max(round(image.width * scale), 1), max(round(image.height * scale), 1)), kernel
        )
        left, top = (self.width - scaled.width) // 2, (self.height - scaled.height) // 2
        if self.resize == "crop":
            return scaled.crop((-left, -top, self.width - left, self.height - top))
        padded = Image.new(image.mode, size, 0)
        padded.paste(scaled, (left, top))
        return padded
