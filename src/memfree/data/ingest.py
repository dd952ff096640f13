"""Ingest: a source opened by name, its images decoded, framed to one size, and hashed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from PIL import Image

from memfree.console import counted
from memfree.data.dataset_folder import SourceHash
from memfree.data.emoji import Emoji
from memfree.data.options import Filter, RecordOptions, Resize, SourceName
from memfree.data.skipped import Skipped, skipping
from memfree.data.sources import Cifar10, Digits, ImageFolder, Shards, Source, SourceImage
from memfree.images import (
    channels_of,
    further_frames,
    open_image,
    to_array,
    to_image,
    upright,
    with_channels,
)

_DEFAULT_OPTIONS = RecordOptions()


@dataclass(frozen=True)
class Framing:
    """Size and channel count of all images of a dataset; unset, they must not differ."""

    height: int | None
    """Rows of pixels; None: those of the first image."""
    width: int | None
    """Columns of pixels; None: those of the first image."""
    channels: int | None
    """1 grey, 2 grey with alpha, 3 RGB, 4 RGBA; None: those of the first image."""
    resize: Resize = "crop"
    """crop: scale to cover, keep the centre; squash: scale both sides; pad: scale to fit."""
    filter: Filter = "bicubic"
    """Interpolation, antialiased when it shrinks."""

    def fixed_by(self, image: Image.Image, name: str) -> Framing:
        """This framing with unset fields taken from the first image."""
        width, height = self.width, self.height
        if width is None or height is None:
            width, height = upright(image).size
        channels = self.channels or channels_of(image, name)
        return replace(self, height=height, width=width, channels=channels)

    def apply(self, image: Image.Image, name: str, requested: Framing) -> np.ndarray:
        """Pixels (C, H, W) uint8 of one image; what ``requested`` leaves unset is not converted."""
        assert self.height is not None and self.width is not None and self.channels is not None
        channels = channels_of(image, name)
        if requested.channels is None and channels != self.channels:
            raise ValueError(
                f"{name}: {counted(channels, 'channel')}, but the first image has {self.channels}; "
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
        return to_array(self._scaled(image, self.width, self.height))

    def _scaled(self, image: Image.Image, width: int, height: int) -> Image.Image:
        kernel = Image.Resampling[self.filter.upper()]
        if self.resize == "squash":
            return image.resize((width, height), kernel)
        ratios = (width / image.width, height / image.height)
        scale = max(ratios) if self.resize == "crop" else min(ratios)
        scaled = image.resize(
            (max(round(image.width * scale), 1), max(round(image.height * scale), 1)), kernel
        )
        left, top = (width - scaled.width) // 2, (height - scaled.height) // 2
        if self.resize == "crop":
            return scaled.crop((-left, -top, width - left, height - top))
        padded = Image.new(image.mode, (width, height), 0)
        padded.paste(scaled, (left, top))
        return padded


@dataclass
class Ingested:
    """All images of a source, framed alike."""

    pixels: np.ndarray
    """(N, C, H, W) uint8, memory-mapped."""
    names: list[str]
    labels: list[int] | None
    captions: list[str] | None
    groups: list[str | None]
    families: list[str | None]
    source_hash: str = ""

    def num_classes(self, class_names: list[str] | None) -> int | None:
        """Number of classes: that of the source's names, or the largest label plus one."""
        if self.labels is None:
            return None
        return len(class_names) if class_names is not None else max(self.labels) + 1


def ingest(
    source: Source,
    framing: Framing,
    file: Path,
    skipped: Skipped | None,
    progress: Callable[[str], None] | None = None,
) -> Ingested:
    """Decode, frame and store every image in the scratch ``file``, which may exceed memory.

    ``skipped`` receives unusable images; if None, the first one is a ValueError.
    """
    fixed: Framing | None = None
    items: list[SourceImage] = []
    names: set[str] = set()
    digest = SourceHash()
    shape: tuple[int, ...] = ()
    with open(file, "xb") as out:
        for item in source.images(skipped):
            digest.add(item)
            with skipping(skipped, ValueError):
                if isinstance(item.pixels, bytes):
                    image = open_image(item.pixels, item.name)
                else:
                    image = to_image(item.pixels)
                channels_of(image, item.name)
                if items:
                    _same_conditions(item, items[0])
                if fixed is None:
                    fixed = framing.fixed_by(image, item.name)
                array = fixed.apply(image, item.name, framing)
                if frames := further_frames(image):
                    note = source.left_out.at(item.name)
                    note(f"{item.name}: {counted(frames, 'further frame')}")
                out.write(array.tobytes())
                shape = array.shape
                item.pixels = b""
                item.name = _unused(item.name, names)
                items.append(item)
                if progress is not None:
                    progress(item.name)
    if skipped is not None:
        skipped.kept += len(items)
    if not items:
        first = f"; first {skipped.messages[0]}" if skipped and skipped.messages else ""
        other = f"; {source.left_out.text()}" if source.left_out else ""
        raise ValueError(f"the source has no readable image{first}{other}")
    return Ingested(
        np.memmap(file, np.uint8, "r", shape=(len(items), *shape)),
        [item.name for item in items],
        [int(item.label) for item in items] if items[0].label is not None else None,  # type: ignore[arg-type]
        [str(item.caption) for item in items] if items[0].caption is not None else None,
        [item.group for item in items],
        [item.family for item in items],
        digest.hexdigest(source.class_names),
    )


def _unused(name: str, names: set[str]) -> str:
    """The name, numbered if it is taken; adds it to ``names``."""
    unique, number = name, 0
    while unique in names:
        number += 1
        unique = f"{name}#{number}"
    names.add(unique)
    return unique


def _same_conditions(item: SourceImage, first: SourceImage) -> None:
    for what in ("label", "caption"):
        has, expected = (getattr(image, what) is not None for image in (item, first))
        if has != expected:
            actual, wanted = ("has a", "has none") if has else ("has no", "has one")
            raise ValueError(f"{item.name} {actual} {what}, but {first.name} {wanted}")


_MEANT = {
    "folder": ("image_suffix", "caption_source"),
    "shards": ("key_ends", "image_suffix", "caption_source"),
}


def open_source(
    source: SourceName,
    path: str | None,
    emoji_variants: bool = False,
    records: RecordOptions = _DEFAULT_OPTIONS,
) -> Source:
    """Open a source by name; ValueError if an option is missing or does not apply.

    ``path``: image folder, shards, emoji font (default: an installed one), or where CIFAR-10 is
    downloaded to (default: ``data/downloads``); not for digits.
    """
    caption_source = records.caption_source
    for option, is_meant in {
        "--emoji_variants": source == "emoji" or not emoji_variants,
        **{
            f"--records.{option.name}": option.name in _MEANT.get(source, ())
            or getattr(records, option.name) == option.default
            for option in fields(RecordOptions)
        },
        f"--records.caption_source {caption_source}": (source, caption_source)
        not in (("folder", "json"), ("shards", "metadata")),
        "--path": source != "digits" or path is None,
    }.items():
        if not is_meant:
            raise ValueError(f"{option} has no meaning with --source {source}")
    if source == "digits":
        return Digits()
    if source == "cifar10":
        return Cifar10(Path(path or "data/downloads"))
    if source == "emoji":
        return Emoji(Path(path) if path is not None else None, emoji_variants)
    if path is None:
        raise ValueError(f"--source {source} needs --path")
    return ImageFolder(Path(path), records) if source == "folder" else Shards(path, records)
