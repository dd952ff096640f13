"""The caption that caption deduplication steers away from: y_N of AMG (eq. 15 and 16)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memfree.retrieval.options import CaptionPolicy

if TYPE_CHECKING:
    from memfree.retrieval.items import Items


def duplicated_captions(
    items: Items, rows: Tensor, policy: CaptionPolicy = "nearest", m: int = 20
) -> list[str]:
    """Caption of what each query is suspected to copy.

    ``nearest`` is the paper's: the caption of the nearest image. ``most_common`` is the authors'
    code's: the caption of most neighbours, if it is that of more than m, else the nearest image's.
    The authors' neighbours are records, each copy of an image one of them; here copies are one row
    with a count, and of near copies only the nearest is returned. So a neighbour counts with all
    training records of its group under each of their captions. Of captions that are equally common
    the one of the nearer image is taken.

    Args:
        items: what the index knows of its rows.
        rows: (B, k) rows that a search returned, nearest first.
        policy: see above.
        m: how many records must have the most common caption for it to count; 20 of 1000
            neighbours in the authors' code.

    Returns:
        B captions; an image without any gives that of its group's most records, or "".

    Raises:
        ValueError: the index has no captions, the rows are not (B, k) with k ≥ 1, or m < 0.
    """
    if items.captions is None:
        raise ValueError("the index has no captions: build it from captioned images")
    if rows.ndim != 2 or rows.shape[1] < 1:
        raise ValueError(f"rows must be (B, k) as a search returns them, not {tuple(rows.shape)}")
    if m < 0:
        raise ValueError(f"m is {m}, but must be 0 or more")
    if policy == "nearest":
        rows = rows[:, :1]
    # Of these rows alone: an index may have millions.
    rows = rows.to(items.group.device)
    captions = []
    # Both in one copy, for which the host waits.
    for neighbours, numbers in zip(*torch.stack([rows, items.group[rows]]).tolist(), strict=True):
        caption = items.captions[neighbours[0]]
        if not caption:
            caption = _most_common(items, numbers[:1])[0]
        if policy == "most_common":
            best, records = _most_common(items, numbers)
            if records > m:
                caption = best
        captions.append(caption)
    return captions


def _most_common(items: Items, groups: list[int]) -> tuple[str, int]:
    """The caption of most records of some groups, nearest first, and how many; ("", 0) of none."""
    counts: dict[str, int] = {}
    for number in dict.fromkeys(groups):
        for caption, count in items.caption_counts.get(number, {}).items():
            if caption:
                counts[caption] = counts.get(caption, 0) + count
    # max keeps the first of equals, and dicts keep the order of the neighbours.
    best = max(counts, key=lambda caption: counts[caption], default="")
    return best, counts.get(best, 0)
