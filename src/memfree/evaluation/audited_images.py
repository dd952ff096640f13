"""Images to audit: folders, files, tars and sample folders, every frame of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from memfree.console import shown
from memfree.data.file_names import (
    OTHER_PICTURES,
    SUFFIXES,
    files_below,
    is_tar,
    problem_with_file,
    shard_labels,
)
from memfree.data.ingest import Framing
from memfree.data.shard_reader import expand_shards, read_members
from memfree.data.skipped import LeftOut, Skipped
from memfree.images import MAX_IMAGE_BYTES, MAX_PIXELS, channels_of, from_bytes, open_image, upright

MAX_FRAMES = 1000  # of one animated image that are judged
READ = "PNG, JPEG or WEBP"
_NOT_READ = "only PNG, JPEG and WEBP are judged; convert or unpack it"
_HEAD = 264  # bytes that tell a tar
_SIGNATURES: tuple[tuple[str, int, bytes | tuple[bytes, ...]], ...] = (
    (READ, 0, (b"\x89PNG", b"\xff\xd8\xff")),
    (READ, 8, b"WEBP"),
    ("tar", 257, b"ustar"),
    ("GIF", 0, b"GIF8"),
    ("TIFF", 0, (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    ("AVIF", 4, b"ftypavi"),
    ("HEIC", 4, (b"ftyphe", b"ftypmi", b"ftypms")),
    ("CR3", 4, b"ftypcrx"),
    ("JPEG 2000", 4, b"jP  "),
    ("JPEG 2000", 0, b"\xff\x4f\xff\x51"),
    ("JPEG XL", 0, b"\xff\x0a"),
    ("JPEG XL", 4, b"JXL "),
    ("Photoshop", 0, b"8BPS"),
    ("QOI", 0, b"qoif"),
    ("ICO", 0, b"\0\0\1\0"),
    ("OpenEXR", 0, b"\x76\x2f\x31\x01"),
    ("DDS", 0, b"DDS "),
    ("ICNS", 0, b"icns"),
    ("JPEG XR", 0, b"II\xbc\x01"),
    ("PDF", 0, b"%PDF-"),
    ("ZIP", 0, b"PK\3\4"),
    ("7z", 0, b"7z\xbc\xaf\x27\x1c"),
    ("RAR", 0, b"Rar!\x1a\7"),
    ("gzip", 0, b"\x1f\x8b\x08"),
    ("bzip2", 0, b"BZh"),
    ("xz", 0, b"\xfd7zXZ\0"),
    ("zstd", 0, b"\x28\xb5\x2f\xfd"),
)
"""Kind of a file, or of what it may hold, and the bytes at a place that tell it."""
_ARCHIVE_KINDS = ("ZIP", "7z", "RAR")
_PACKED = (*_ARCHIVE_KINDS, "gzip", "bzip2", "xz", "zstd")
_ARRAYS = (".npz", ".pt", ".pth", ".ckpt", ".bin", ".whl")
"""Endings of ZIP archives that hold numbers or programs, lower case."""
_APPLE_DOUBLE = b"\0\5\x16\7"  # ._a.png, which macOS writes beside a.png
_ARCHIVES = (".zip", ".7z", ".rar", ".tar.zst", ".tar.lz4")
_NETPBM = tuple(b"P%d" % number for number in range(1, 8))  # followed by white space
_TEXTS = (".txt", ".json", ".cls", ".csv", ".md", ".html", ".xml", ".yaml", ".yml", ".npy", ".npz")
"""Endings of members of shards that are not looked at, lower case: texts and arrays."""


@dataclass
class AuditedImages:
    """The images at a path, in order, and what had to be done to them.

    The first bytes of a file say what it is, whatever it is called. Every frame of an animated
    image is an image of its own. Pictures that cannot be judged (other formats, damaged ones) are
    in ``skipped``, all other files in ``left_out``: nothing is passed over in silence.

    Args:
        path: a folder (searched with its sub-folders, links followed) or one file, of PNG, JPEG or
            WEBP images and tar shards; or a pattern of shards with braces.
        shape: (C, H, W) that every image is brought to: scaled until it covers the size, centre
            kept.
    """

    path: Path
    shape: tuple[int, int, int]
    skipped: Skipped = field(default_factory=Skipped)
    """Pictures and shards that could not be judged."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """Other files beside pictures and shards."""
    changed: int = 0
    """Images of another size or number of channels."""
    frames: int = 0
    """Images that are a frame of a file with several."""

    @property
    def _option(self) -> str:
        return f"--images {shown(str(self.path))}"

    def batches(self, batch_size: int) -> Iterator[tuple[list[str], Tensor]]:
        """Names, and images (b, C, H, W) float32 in [−1, 1].

        Raises:
            FileNotFoundError: there is nothing of that name, or no image in it.
            ValueError: it is a file of another kind.
        """
        channels, height, width = self.shape
        framing = Framing(height, width, channels, resize="crop")
        names: list[str] = []
        pixels: list[np.ndarray] = []
        for name, image in self._images():
            try:
                shape = (channels_of(image, name), *upright(image).size[::-1])
                pixels.append(framing.apply(image, name, framing))
            except ValueError as error:
                self.skipped.record(str(error))
                continue
            names.append(name)
            self.skipped.kept += 1
            self.changed += shape != self.shape
            if len(names) == batch_size:
                yield names, from_bytes(torch.from_numpy(np.stack(pixels)))
                names, pixels = [], []
        if names:
            yield names, from_bytes(torch.from_numpy(np.stack(pixels)))
        if not self.skipped.kept and not self.skipped:
            beside = f"; {self.left_out.text()}" if self.left_out else ""
            raise FileNotFoundError(
                f"{self._option}: no {READ} images and no tar shards in it{beside}"
            )

    def _images(self) -> Iterator[tuple[str, Image.Image]]:
        """Every frame of every picture; frames are named if there are several."""
        for name, data in self._encoded():
            try:
                image = open_image(data, name)
            except ValueError as error:
                self.skipped.record(str(error))
                continue
            count = getattr(image, "n_frames", 1)
            for number in range(min(count, MAX_FRAMES)):
                called = f"{name} (frame {number + 1} of {count})" if count > 1 else name
                try:
                    if number:
                        image.seek(number)
                        if image.width * image.height > MAX_PIXELS:
                            raise ValueError(f"more pixels than the limit {MAX_PIXELS}")
                        image.load()
                except Exception as error:  # whatever a decoder makes of a damaged later frame
                    self.skipped.record(f"{called}: damaged ({type(error).__name__})")
                    continue
                self.frames += count > 1
                yield called, image
            if count > MAX_FRAMES:
                self.skipped.record(f"{name}: only {MAX_FRAMES} of its {count} frames were judged")

    def _encoded(self) -> Iterator[tuple[str, bytes]]:
        """Name and content of every picture of the formats that are read."""
        if self.path.is_dir():
            yield from self._of_folder()
        elif self.path.exists():
            yield from self._of_file()
        else:
            try:
                shards = expand_shards(str(self.path), self.skipped, self.left_out)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{self._option}: no such file or folder ({error})"
                ) from error
            yield from self._of_shards(shards)

    def _of_folder(self) -> Iterator[tuple[str, bytes]]:
        note = self.left_out.at(f"{self.path}/")
        shards: list[str] = []
        pictures: list[tuple[str, Path]] = []
        for file in files_below(self.path, self.left_out, self.skipped, hidden=True):
            name = shown(str(file.relative_to(self.path)))
            try:
                kind = _kind_of(file)
            except (OSError, ValueError) as error:
                self.skipped.record(f"{name}: {_reason(error)}")
                continue
            if kind == "tar":
                shards.append(str(file))
            elif self._is_read(name, kind, note):
                pictures.append((name, file))
        for name, file in pictures:
            try:
                data = _content(file)
            except OSError as error:
                self.skipped.record(f"{name}: {_reason(error)}")
            else:
                yield name, data
        yield from self._of_shards(shards)

    def _of_file(self) -> Iterator[tuple[str, bytes]]:
        try:
            kind = _kind_of(self.path)
        except ValueError as error:
            raise ValueError(f"{self._option}: {error}") from error
        if kind is None:
            raise ValueError(
                f"{self._option} is not an image (PNG, JPEG, WEBP), a folder or a tar shard"
            )
        if kind == "tar":
            yield from self._of_shards([str(self.path)])
        elif kind == READ:
            yield shown(self.path.name), _content(self.path)
        else:
            raise ValueError(f"{self._option}: {kind}: {_NOT_READ}")

    def _of_shards(self, shards: list[str]) -> Iterator[tuple[str, bytes]]:
        for shard, label in zip(shards, shard_labels(shards), strict=True):
            note = self.left_out.at(f"{shard}, by content")
            called = ""

            def wanted(name: str) -> bool:
                nonlocal called
                called = name
                return PurePosixPath(name).suffix.lower() not in _TEXTS

            members = read_members(
                shard, wanted, MAX_IMAGE_BYTES, self.skipped, self.left_out, shown(label)
            )
            for name, data in members:
                # ``called`` still has its ending
                if self._is_read(name, _kind(data[:_HEAD], called), note):
                    yield name, data

    def _is_read(self, name: str, kind: str | None, note: Callable[[str], None]) -> bool:
        """Whether a file is a picture that can be judged; any other is recorded."""
        if kind is None:
            note(name)
        elif kind != READ:
            self.skipped.record(f"{name}: {kind}: {_NOT_READ}")
        return kind == READ


def _kind_of(file: Path) -> str | None:
    """``_kind`` of a file; ValueError if it is not a plain one."""
    if problem := problem_with_file(file):
        raise ValueError(problem)
    with open(file, "rb") as opened:
        return _kind(opened.read(_HEAD), file.name)


def _content(file: Path) -> bytes:
    with open(file, "rb") as opened:
        return opened.read(MAX_IMAGE_BYTES + 1)  # one byte more than open_image takes


def _kind(head: bytes, name: str) -> str | None:
    """``READ``, ``tar``, another format that may hold pictures, or None for anything else."""
    if is_tar(name):
        return "tar"
    path = PurePosixPath(name.lower())
    suffix = path.suffix
    for kind, place, signature in _SIGNATURES:
        if head.startswith(signature, place):
            if kind not in _PACKED:
                return kind
            inner = PurePosixPath(path.stem).suffix  # of labels.json.gz
            harmless = suffix in _ARRAYS if kind in _ARCHIVE_KINDS else inner in _TEXTS
            return None if harmless else f"packed as {kind}"
    if head.startswith(b"BM") and head[6:10] == bytes(4):
        return "BMP"
    if head.startswith(_NETPBM) and head[2:3].isspace() and head[3:4] in b"#0123456789":
        return "PNM"
    if head.startswith(_APPLE_DOUBLE):
        return None
    if path.name.endswith(_ARCHIVES):
        return f"a {suffix} archive"
    if suffix in SUFFIXES:
        return READ  # although it is not, as open_image will say
    return suffix[1:].upper() if suffix in OTHER_PICTURES else None


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
