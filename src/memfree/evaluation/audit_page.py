"""The page of an audit: images beside their nearest training images, most suspicious first."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from torch import Tensor

from memfree.evaluation.page import SMALL_IMAGE
from memfree.evaluation.templates import template
from memfree.sampling import png

LIMITS = (
    "A copy is a whole image that is near a whole image of the index. Crops, mirrored images, "
    "copied parts, styles and contents are seen only as far as the index's features see them.",
    "Only images in the index can be found.",
    "p-values compare with held-out real images. Generated images, or images of another kind, can "
    "be nearer to training images than real ones without being copies; look at the pairs.",
    "The false discovery rate is an average over audits, not a promise for this one.",
)
"""What an audit does not say."""


def render(
    table: pa.Table,
    pictures: Tensor,
    nearest: Mapping[str, Tensor],
    facts: Mapping[str, str],
    warning: str,
) -> str:
    """The page's HTML, which needs no network.

    Args:
        table: the audit, most suspicious first.
        pictures: (k, C, H, W) in [−1, 1]: the first k images of the table.
        nearest: training images by key, as far as they are known.
        facts: what was compared and how.
        warning: why nothing could be found, so that no discovery says little, or empty.
    """
    rows = table.slice(0, len(pictures)).to_pylist()
    discoveries, copies = (sum(table[name].to_pylist()) for name in ("discovery", "copy"))
    height, width = pictures.shape[2:]
    return template("audit.html").render(
        headline=_headline(discoveries, table.num_rows, undecided=bool(warning)),
        lead=f"{copies} are above the threshold for a single image. Shown are the "
        f"{len(rows)} that are nearest to an indexed image, each with that image below it.",
        pairs=[
            _pair(row, image, nearest.get(row["nearest_key"]))
            for row, image in zip(rows, pictures, strict=True)
        ],
        aspect=f"{width} / {height}",
        small=max(height, width) < SMALL_IMAGE,
        shows_training=bool(nearest),
        facts=list(facts.items()),
        warning=warning,
        limits=LIMITS,
    )


def _headline(discoveries: int, images: int, undecided: bool) -> str:
    """What was found; that none could be found is no finding of none."""
    if undecided:
        return (
            f"Undecided: there are too few calibration images to tell copies among {images} images"
        )
    return f"{discoveries} of {images} images are called copies of indexed images"


def _pair(row: dict[str, Any], image: Tensor, nearest: Tensor | None) -> dict[str, Any]:
    return {
        **row,
        "png": _encoded(image),
        "nearest_png": None if nearest is None else _encoded(nearest),
        "kind": "copy" if row["discovery"] else "near" if row["copy"] else "fine",
    }


def _encoded(image: Tensor) -> str:
    return base64.b64encode(png.encode(png.to_bytes(image))).decode("ascii")
