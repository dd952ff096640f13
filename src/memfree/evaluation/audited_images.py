"""Images from anywhere, brought to an index's shape: folders, files, shards, sample folders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memfree.data.decode import MAX_IMAGE_BYTES, channels_of, open_image, upright
from memfree.data.folder import to_float
from memfree.data.framing import Framing
from memfree.data.names import SUFFIXES
from memfree.data.skipped import Skipped
from memfree.data.tarstream import expand_shards, read_shard


@dataclass
class AuditedImages:
    """The images at a path, in order, and what had to be done to them.

    Args:
        path: a folder (searched with its sub-folders) or one file, of PNG, JPEG or WEBP images; or
            tar shards: one, a folder of them (samples, datasets), or a pattern with braces.
        shape: (C, H, W) that every image is brought to: scaled until it covers the size, centre
            kept.
    """

    path: Path
    shape: tuple[int, int, int]
    skipped: Skipped = field(default_factory=Skipped)
    """What could not be read."""
    changed: int = 0
    """Images of another size or number of channels."""

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
        for name, data in self._encoded():
            try:
                image = open_image(data, name)
                found = (channels_of(image, name), *upright(image).size[::-1])
                pixels.append(framing.apply(image, name, framing))
            except ValueError as error:
                self.skipped.record(str(error))
                continue
            names.append(name)
            self.skipped.kept += 1
            self.changed += found != self.shape
            if len(names) == batch_size:
                yield names, to_float(torch.from_numpy(np.stack(pixels)))
                names, pixels = [], []
        if names:
            yield names, to_float(torch.from_numpy(np.stack(pixels)))

    def _encoded(self) -> Iterator[tuple[str, bytes]]:
        files = self._files()
        if files is None:
            for shard in expand_shards(str(self.path), self.skipped):
                for record in read_shard(shard, self.skipped):
                    yield record.name, record.image
            return
        for file in files:
            name = str(file.relative_to(self.path)) if self.path.is_dir() else file.name
            try:
                with open(file, "rb") as opened:  # one byte more than open_image takes
                    yield name, opened.read(MAX_IMAGE_BYTES + 1)
            except OSError as error:
                self.skipped.record(f"{name}: {error.strerror or error}")

    def _files(self) -> list[Path] | None:
        """Image files; None where the path names shards."""
        if self.path.is_dir():
            found = [
                file
                for file in sorted(self.path.rglob("*"))
                if file.suffix.lower() in SUFFIXES and file.is_file()
            ]
            if found:
                return found
            if not any(self.path.glob("*.tar")):
                raise FileNotFoundError(
                    f"--images {self.path}: no PNG, JPEG or WEBP images and no tar shards in it"
                )
            return None
        if self.path.suffix.lower() in SUFFIXES:
            if not self.path.is_file():
                raise FileNotFoundError(f"--images {self.path}: no such file")
            return [self.path]
        if self.path.is_file() and not {".tar", ".tgz"} & set(self.path.suffixes):
            raise ValueError(
                f"--images {self.path} is no image (PNG, JPEG, WEBP), no folder and no tar shard"
            )
        return None
