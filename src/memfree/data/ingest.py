"""Read a whole source once into a flat array of equal images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memfree.data.decode import channels_of, further_frames, open_image, to_image
from memfree.data.framing import Framing
from memfree.data.identity import SourceHash
from memfree.data.skipped import Skipped
from memfree.data.sources import Source, SourceImage
from memfree.data.wording import counted


@dataclass
class Ingested:
    """All images of a source, framed alike."""

    pixels: np.ndarray
    """(N, C, H, W) uint8, memory-mapped."""
    names: list[str]
    """Unique."""
    labels: list[int] | None
    captions: list[str] | None
    groups: list[str | None]
    families: list[str | None]
    source_hash: str = ""
    """See :class:`memfree.data.identity.SourceHash`."""

    def num_classes(self, class_names: list[str] | None) -> int | None:
        """Number of classes: the source's names, or the largest label and one."""
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
    """Decode, frame and store every image.

    Args:
        source: where they come from.
        framing: size and channels; what is unset is taken from the first image.
        file: scratch file for the pixels, so that sets larger than memory work.
        skipped: takes what cannot be used and is left out; None: the first one is an error.
        progress: called with each image's name.

    Raises:
        ValueError: an image is damaged, has another size or channel count, or lacks the label or
            caption that others have; or there are no images.
    """
    fixed: Framing | None = None
    items: list[SourceImage] = []
    names: set[str] = set()
    digest = SourceHash()
    shape: tuple[int, ...] = ()
    with open(file, "xb") as out:
        for item in source.images(skipped):
            digest.add(item)
            try:
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
            except ValueError as error:
                if skipped is None:
                    raise
                skipped.record(str(error))
                continue
            if frames := further_frames(image):
                source.left_out.at(item.name)(f"{item.name}: {counted(frames, 'further frame')}")
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
    """The name, with a number where other images have it; keeps it in ``names``."""
    unique, number = name, 0
    while unique in names:
        number += 1
        unique = f"{name}#{number}"
    names.add(unique)
    return unique


def _same_conditions(item: SourceImage, first: SourceImage) -> None:
    """Refuse a mixture of images with and without labels or captions."""
    for what in ("label", "caption"):
        has, expected = (getattr(one, what) is not None for one in (item, first))
        if has != expected:
            found, wanted = ("has a", "has none") if has else ("has no", "has one")
            raise ValueError(f"{item.name} {found} {what}, but {first.name} {wanted}")
