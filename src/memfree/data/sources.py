"""Where images come from: one small interface, five sources."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from memfree.data.decode import MAX_IMAGE_BYTES, SUFFIXES
from memfree.data.options import SourceName
from memfree.data.skipped import Skipped
from memfree.data.tarrecord import MAX_TEXT_BYTES
from memfree.data.tarstream import expand_shards, read_shard
from memfree.data.wording import counted
from memfree.untrusted import short


@dataclass
class SourceImage:
    """One image as its source gives it."""

    name: str
    """Key that is unique in the source."""
    pixels: np.ndarray | bytes
    """(C, H, W) uint8, or the encoded file."""
    label: int | None = None
    """Class number from 0, None without classes."""
    caption: str | None = None
    group: str | None = None
    """Group that the source declares, None: found by content."""
    family: str | None = None
    """Pictures of one design that are no copies of each other: they stay in one part, as groups do,
    because a held-out one would say how alike the design is, not how alike strangers are."""


class Source(Protocol):
    """A finite, ordered set of images."""

    licence: str
    """Under which terms the images may be used."""
    class_names: list[str] | None
    """Names of the classes, None where the source has none."""
    default_sizes: tuple[float, float, float, float]
    """Images for train, calibration, test and fit: counts, or shares below 1."""
    size: tuple[int, int]
    """(number of images, bytes of their files) where known beforehand, 0 otherwise."""

    def images(self, skipped: Skipped | None) -> Iterator[SourceImage]:
        """All images in a fixed order; ``skipped`` takes what is broken instead of an error."""


SHARES = (0.7, 0.1, 0.1, 0.1)
"""Default sizes of a source whose number of images nobody knows beforehand."""


class Digits:
    """The 1797 handwritten digits, 8 x 8 grey, that scikit-learn carries: needs no download."""

    licence = "CC BY 4.0 (UCI, Optical Recognition of Handwritten Digits)"
    class_names: list[str] | None = [str(digit) for digit in range(10)]
    default_sizes = (500.0, 600.0, 500.0, 197.0)
    size = (1797, 0)

    def images(self, skipped: Skipped | None) -> Iterator[SourceImage]:
        """See :class:`Source`; values 0 to 16 become 0 to 255."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        for number, (image, label) in enumerate(zip(pixels, digits.target, strict=True)):
            yield SourceImage(f"digits-{number:04d}", image[None], int(label))


class Cifar10:
    """CIFAR-10 by torchvision: 60 000 images of both of its parts, downloaded once."""

    licence = "not stated by its authors; cite Krizhevsky 2009"
    default_sizes = (50_000.0, 4_000.0, 4_000.0, 2_000.0)
    size = (60_000, 0)

    def __init__(self, path: Path) -> None:
        from torchvision.datasets import CIFAR10

        path.mkdir(parents=True, exist_ok=True)
        try:
            self._parts = [CIFAR10(str(path), train=part, download=True) for part in (True, False)]
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise OSError(f"CIFAR-10 could not be downloaded to {path}: {reason}") from error
        self.class_names: list[str] | None = list(self._parts[0].classes)

    def images(self, skipped: Skipped | None) -> Iterator[SourceImage]:
        """See :class:`Source`."""
        for name, part in zip(("train", "test"), self._parts, strict=True):
            pixels = part.data.transpose(0, 3, 1, 2)
            for number, (image, label) in enumerate(zip(pixels, part.targets, strict=True)):
                yield SourceImage(f"cifar10-{name}-{number:05d}", image, int(label))


class ImageFolder:
    """PNG, JPEG and WEBP files under a folder, in class folders or with captions beside them.

    A sub-folder is a class, named by it (deeper folders belong to it); images directly in the
    folder have no class. ``NAME.txt`` beside ``NAME.png`` is its caption; either all images have
    one or none.
    """

    licence = "not stated"
    default_sizes = SHARES

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise FileNotFoundError(f"--path: no image folder at {path}")
        self._path = path
        self._files = sorted(
            file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()
        )
        if not self._files:
            raise FileNotFoundError(f"--path: no PNG, JPEG or WEBP images under {path}")
        tops = [file.relative_to(path).parts for file in self._files]
        loose = sum(len(parts) == 1 for parts in tops)
        if 0 < loose < len(tops):
            raise ValueError(
                f"--path {path}: {counted(loose, 'image')} outside of the class folders; "
                "put all images in class folders, or none"
            )
        names = sorted({parts[0] for parts in tops if len(parts) > 1})
        self.class_names: list[str] | None = names or None
        self._captioned = any(file.with_suffix(".txt").is_file() for file in self._files)
        self.size = (len(self._files), sum(file.stat().st_size for file in self._files))

    def images(self, skipped: Skipped | None) -> Iterator[SourceImage]:
        """See :class:`Source`."""
        for file in self._files:
            relative = file.relative_to(self._path)
            try:
                yield self._image(file, relative)
            except (OSError, ValueError) as error:
                if skipped is None:
                    raise
                skipped.record(str(error))

    def _image(self, file: Path, relative: Path) -> SourceImage:
        if not relative.as_posix().isprintable():  # it becomes a key, which is stored and shown
            raise ValueError(f"{short(file)}: its name is no text that can be shown: rename it")
        if file.stat().st_size > MAX_IMAGE_BYTES:
            raise ValueError(f"{file}: more than the limit of {MAX_IMAGE_BYTES} bytes")
        caption = None
        if self._captioned:
            text = file.with_suffix(".txt")
            if not text.is_file():
                raise FileNotFoundError(
                    f"{file}: other images have a caption, {text.name} does not exist"
                )
            if text.stat().st_size > MAX_TEXT_BYTES:
                raise ValueError(f"{text}: more than the limit of {MAX_TEXT_BYTES} bytes")
            caption = text.read_text(encoding="utf-8", errors="replace").strip()
        label = self.class_names.index(relative.parts[0]) if self.class_names else None
        return SourceImage(relative.as_posix(), file.read_bytes(), label, caption)


class Shards:
    """WebDataset tars of any origin: ``KEY.png|jpg|webp`` with ``KEY.txt``, ``.cls``, ``.json``.

    Shards of img2dataset are read as they are. Images that declare ``image_key`` and ``group`` in
    their JSON, as shards of memfree do, keep their groups.
    """

    licence = "not stated"
    class_names: list[str] | None = None
    default_sizes = SHARES

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        there = [Path(shard) for shard in expand_shards(pattern, Skipped())]
        self.size = (0, sum(file.stat().st_size for file in there if file.is_file()))

    def images(self, skipped: Skipped | None) -> Iterator[SourceImage]:
        """See :class:`Source`."""
        for shard in expand_shards(self._pattern, skipped):
            for record in read_shard(shard, skipped):
                yield SourceImage(
                    record.name, record.image, record.label, record.caption, record.group
                )


def open_source(source: SourceName, path: str | None, emoji_variants: bool = False) -> Source:
    """The source of this name.

    Args:
        source: ``digits``, ``cifar10``, ``emoji``, ``folder`` or ``shards``.
        path: the image folder, the shards, the emoji font (default: found among the installed
            ones), or where CIFAR-10 is downloaded to (default: ``data/downloads``); not for digits.
        emoji_variants: emoji with skin tones and gender signs too.

    Raises:
        ValueError: ``path`` is missing or has no meaning, or the font has no colour bitmaps.
        OSError: there is nothing at ``path``.
    """
    if emoji_variants and source != "emoji":
        raise ValueError(f"--emoji_variants has no meaning with --source {source}")
    if source == "digits":
        if path is not None:
            raise ValueError("--path has no meaning with --source digits")
        return Digits()
    if source == "cifar10":
        return Cifar10(Path(path or "data/downloads"))
    if source == "emoji":
        from memfree.data.emoji import Emoji  # it builds on this module

        return Emoji(Path(path) if path is not None else None, emoji_variants)
    if path is None:
        raise ValueError(f"--source {source} needs --path")
    if source == "folder":
        return ImageFolder(Path(path))
    return Shards(path)
