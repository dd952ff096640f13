"""Options of sources, streams and training data, without torch so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Resize = Literal["crop", "squash", "pad"]
Filter = Literal["box", "bilinear", "bicubic", "lanczos"]
SourceName = Literal["digits", "cifar10", "emoji", "folder", "shards"]
OnError = Literal["stop", "skip"]
KeyEnds = Literal["ask", "first_dot", "last_dot"]
CaptionSource = Literal["any", "txt", "caption", "json", "metadata", "none"]
LabelPolicy = Literal["own", "random", "unique"]
PromptSet = Literal["duplicated", "other", "unseen"]
DEFAULT_DISTANCE = 0.15
"""Largest distance of near duplicates; see ``duplicates.near_pairs``."""


@dataclass(frozen=True)
class RecordOptions:
    """How to read records whose names or contents leave a choice."""

    key_ends: KeyEnds = "ask"
    """Where the key of k.seg.png ends, in shards: first_dot (WebDataset's rule: a part of sample
    k), last_dot (the picture of a record k.seg) or ask: stop if a sample has no other picture."""
    image_suffix: str | None = None
    """Suffix of the picture in samples with several, such as jpg for k.jpg and the mask k.png; the
    others are left out."""
    caption_source: CaptionSource = "any"
    """Which of several captions to use: txt, caption (files of that ending), json (of a shard's
    record), metadata (of a folder's metadata.jsonl or .csv) or none."""

    def suffix(self) -> str | None:
        """``image_suffix`` in lower case, without its dot."""
        return self.image_suffix.lower().lstrip(".") if self.image_suffix is not None else None


@dataclass(frozen=True)
class StreamOptions:
    """How to read shards without a manifest; not for dataset folders."""

    epoch_records: int = 0
    """Records in one epoch, over all ranks; required, since the shards do not say."""
    image_size: int | tuple[int, int] = 0
    """Height and width of all images; required."""
    channels: Literal[1, 3] = 3
    """1 grey, 3 RGB."""
    resize: Resize = "crop"
    """crop keeps the centre, squash scales both sides, pad adds black borders."""
    num_classes: int = 0
    """Classes of the records' .cls or JSON label; 0: labels are not read."""
    captions: bool = False
    """Give the records' .txt, .caption or JSON caption to the model."""
    shuffle_buffer: int = 1000
    """Records in each worker's buffer, from which the next one is drawn."""
    records: RecordOptions = field(default_factory=RecordOptions)
    """Which files of a sample to use where there is a choice."""


@dataclass(frozen=True)
class DataOptions:
    """The dataset folder or shards to train on, and how to read the records."""

    path: str
    """Dataset folder of ``memfree prepare``; or shards without a manifest: a folder of tars, a
    glob, or addresses with braces (see ``stream``)."""
    batch_size: int = 64
    """Largest number of records in a batch on each rank; batch sizes are nearly equal."""
    seed: int = 0
    """Seed of the order."""
    num_workers: int = 0
    """Processes that decode; 0 decodes in the training process."""
    cache_bytes: int = 1 << 30
    """Keep decoded images in memory if all take at most this many bytes (without workers only)."""
    random_flip: bool = False
    """Mirror each record with probability 1/2."""
    on_error: OnError = "stop"
    """Stop at a broken record or shard, or skip and count it; the first few are named, and the
    number is reported after training."""
    verify: bool = False
    """Compare the SHA-256 of every shard at the start, not only its size."""
    stream: StreamOptions = field(default_factory=StreamOptions)
    """How to read shards without a manifest."""

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ValueError(f"--data.num_workers {self.num_workers}: use 0 or more")
        if self.batch_size < 1:
            raise ValueError(f"--data.batch_size {self.batch_size}: use 1 or more")
