"""Records a second of our stream over bare webdataset decoding of the same shards.

``python benchmarks/stream.py`` writes benchmarks/results/stream.json.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from harness import Records, Timing, interleaved, measure, record
from PIL import Image

from memfree.commands.prepare import prepare
from memfree.data import PartSizes, ShardDataModule
from memfree.data.duplication_plan import DuplicationPlan

BATCH = 64
LIMIT = 0.90
"""Goal: our records a second over webdataset's, at least."""


def colour_folder(folder: Path, count: int = 2000) -> Path:
    """Random 32 x 32 colour PNGs in two class folders."""
    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(path)
    return folder


def measured(name: str, data: Path, mode: str, cached: bool, repetitions: int) -> dict[str, Any]:
    """One epoch of ours, in shuffled batches, over one epoch of webdataset's decoding in order."""
    ours = ShardDataModule(str(data), batch_size=BATCH, cache_bytes=1 << 30 if cached else 0)
    stream = ours.dataset()
    shards = [str(path) for path in sorted(data.glob("train-*.tar"))]
    counts = {}

    def our_epoch() -> None:
        counts["ours"] = sum(len(batch["image"]) for batch in stream)

    def bare_epoch() -> None:
        bare = wds.WebDataset(shards, shardshuffle=False).decode(mode).to_tuple("png", "cls")
        counts["bare"] = sum(len(batch[0]) for batch in bare.batched(BATCH))

    timings: dict[str, Timing] = interleaved({"ours": our_epoch, "bare": bare_epoch}, repetitions)
    assert counts["ours"] == counts["bare"], counts
    speed = {key: counts[key] / timing.median for key, timing in timings.items()}
    pairs = zip(timings["bare"].seconds, timings["ours"].seconds, strict=True)
    return record(
        name,
        speed["ours"],
        speed["bare"],
        "records/s",
        float(np.median([bare / own for bare, own in pairs])),
        repetitions=repetitions,
        limit=LIMIT,
    )


def run(tiny: bool = False) -> Records:
    """Measure; one record a data set (see ``harness.record``)."""
    count, repetitions = (200, 2) if tiny else (2000, 9)
    with tempfile.TemporaryDirectory() as folder:
        digits, colour = Path(folder) / "digits", Path(folder) / "colour"
        digit_parts = PartSizes(train=100) if tiny else PartSizes()
        prepare(
            digits, parts=digit_parts, plan=DuplicationPlan(images=16, factor=4 if tiny else 64)
        )
        source = colour_folder(Path(folder) / "pngs", count)
        prepare(colour, source="folder", path=str(source), near_distance=0)
        return [
            measured(
                "stream of 8 x 8 digits / webdataset decoding", digits, "l8", False, repetitions
            ),
            measured(
                "stream of 32 x 32 colour PNGs / webdataset decoding",
                colour,
                "rgb8",
                False,
                repetitions,
            ),
            measured(
                "stream of 8 x 8 digits, cached / webdataset decoding",
                digits,
                "l8",
                True,
                repetitions,
            ),
        ]


if __name__ == "__main__":
    torch.manual_seed(0)
    measure("stream", run)
