"""Image sources: digits, CIFAR-10, image folders, WebDataset shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from memfree.console import counted
from memfree.data.captions import FolderCaptions
from memfree.data.file_names import (
    OTHER_PICTURES,
    SUFFIXES,
    files_below,
    problem_with,
    problem_with_file,
    read_bytes,
)
from memfree.data.options import RecordOptions
from memfree.data.shard_reader import expand_shards, read_shard
from memfree.data.skipped import LeftOut, Skipped, skipping
from memfree.folders.untrusted import short
from memfree.images import MAX_IMAGE_BYTES

SHARES = (0.7, 0.1, 0.1, 0.1)
"""Default part sizes of a source of unknown length."""
_DEFAULT_OPTIONS = RecordOptions()


@dataclass
class SourceImage:
    """One image as its source yields it."""

    name: str
    """Key, unique in the source."""
    pixels: np.ndarray | bytes
    """(C, H, W) uint8, or the encoded file."""
    label: int | None = None
    """Class number from 0, None without classes."""
    caption: str | None = None
    group: str | None = None
    """Group declared by the source; None: found by content."""
    family: str | None = None
    """Pictures of one design stay in one part: held-out ones would measure that design."""


class Source(Protocol):
    """A finite, ordered set of images."""

    licence: str
    class_names: list[str] | None
    default_sizes: tuple[float, float, float, float]
    """Images for train, calibration, test and fit: counts, or shares below 1."""
    size: tuple[int, int]
    """(images, bytes of their files) if known beforehand, else 0."""
    files: Sequence[Path]
    """User files that the images, classes and captions depend on."""
    left_out: LeftOut
    """What was met and not used; complete once all images are read."""

    def images(self, skipped: Skipped | None) -> Iterator[SourceImage]:
        """All images in a fixed order; ``skipped`` receives broken ones instead of an error."""


class Digits:
    """scikit-learn's 1797 handwritten digits, 8 x 8 grey: needs no download."""

    licence = "CC BY 4.0 (UCI, Optical Recognition of Handwritten Digits)"
    class_names: list[str] | None = [str(digit) for digit in range(10)]
    default_sizes = (500.0, 600.0, 500.0, 197.0)
    size = (1797, 0)
    files: Sequence[Path] = ()

    def __init__(self) -> None:
        self.left_out = LeftOut()

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
    files: Sequence[Path] = ()

    def __init__(self, path: Path) -> None:
        from torchvision.datasets import CIFAR10

        self.left_out = LeftOut()
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

    A sub-folder and all below it is a class; images directly in the folder have none. Links are
    followed, hidden folders left out. Either all images have a caption or none (see
    :class:`memfree.data.captions.FolderCaptions`). Other picture formats are refused, unless they
    stand beside a readable picture of the same name.
    """

    licence = "not stated"
    default_sizes = SHARES

    def __init__(self, path: Path, options: RecordOptions = _DEFAULT_OPTIONS) -> None:
        if not path.is_dir():
            raise FileNotFoundError(f"--path: no image folder at {path}")
        self._path = path
        self.left_out = LeftOut()
        self._unlisted = Skipped()
        self.files: Sequence[Path] = files_below(path, self.left_out, self._unlisted)
        note = self.left_out.at(f"{path}/")
        suffix = options.suffix()
        wanted = SUFFIXES if suffix is None else (f".{suffix}",)
        self._images = [file for file in self.files if file.suffix.lower() in wanted]
        if not self._images:
            which = "PNG, JPEG or WEBP" if suffix is None else f".{suffix}"
            for file in self.files:
                note(file.relative_to(path).as_posix())
            beside = f"; {self.left_out.text()}" if self.left_out else ""
            raise FileNotFoundError(f"--path: no {which} images under {path}{beside}")
        stems = {file.with_suffix("") for file in self._images}
        self._foreign = [
            file
            for file in (self.files if suffix is None else ())
            if file.suffix.lower() in OTHER_PICTURES and file.with_suffix("") not in stems
        ]
        pictures = {*self._images, *self._foreign}
        others = [file for file in self.files if file not in pictures]
        self._captions = FolderCaptions(path, self._images, others, options, note, self._foreign)
        tops = [file.relative_to(path).parts for file in self._images]
        loose = sum(len(parts) == 1 for parts in tops)
        if 0 < loose < len(tops):
            raise ValueError(
                f"--path {path}: {counted(loose, 'image')} outside of the class folders; "
                "put all images in class folders, or none"
            )
        names = {parts[0] for parts in tops if len(parts) > 1 and problem_with(parts[0]) is None}
        self.class_names: list[str] | None = sorted(names) or None
        plain = [file for file in self._images if problem_with_file(file) is None]
        self.size = (len(self._images), sum(file.stat().st_size for file in plain))

    def images(self, skipped: Skipped | None) -> Iterator[SourceImage]:
        """See :class:`Source`."""
        if skipped is not None:
            skipped.add(self._unlisted)
        elif self._unlisted:
            raise OSError(self._unlisted.messages[0])
        foreign = [
            f"{short(file, 1000)}: only PNG, JPEG and WEBP are read; convert it, or leave it out "
            "with --on_error skip"
            for file in self._foreign
        ]
        for problem in foreign + self._captions.lost:
            with skipping(skipped, ValueError):
                raise ValueError(problem)
        for file in self._images:
            with skipping(skipped, ValueError, OSError):
                yield self._image(file)

    def _image(self, file: Path) -> SourceImage:
        name = file.relative_to(self._path).as_posix()
        if problem := problem_with(name):  # it becomes a key, which is stored and shown
            raise ValueError(f"{short(file, 1000)}: its name {problem}; rename it")
        content = read_bytes(file, MAX_IMAGE_BYTES)
        caption = self._captions.of(file)
        label = self.class_names.index(name.split("/")[0]) if self.class_names else None
        return SourceImage(name, content, label, caption)


class Shards:
    """WebDataset tars: ``KEY.png|jpg|webp`` with ``KEY.txt``, ``.caption``, ``.cls``, ``.json``.

    JSON ``image_key`` and ``group`` keep the groups of memfree's own shards.
    """

    licence = "not stated"
    class_names: list[str] | None = None
    default_sizes = SHARES

    def __init__(self, pattern: str, options: RecordOptions = _DEFAULT_OPTIONS) -> None:
        self._pattern, self._options = pattern, options
        self.left_out = LeftOut()
        shards = [Path(shard) for shard in expand_shards(pattern, Skipped(), self.left_out)]
        self.files: Sequence[Path] = [shard for shard in shards if shard.is_file()]
        self.size = (0, sum(file.stat().st_size for file in self.files))

    def images(self, skipped: Skipped | None) -> Iterator[SourceImage]:
        """See :class:`Source`."""
        for shard in expand_shards(self._pattern, skipped):
            for record in read_shard(shard, skipped, self.left_out, self._options):
                yield SourceImage(
                    record.name, record.image, record.label, record.caption, record.group
                )
