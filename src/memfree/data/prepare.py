"""Command ``memfree prepare``: a source, split and repeated as declared, to a dataset folder."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from memfree.data.framing import Filter, Framing, Resize
from memfree.data.grouping import DEFAULT_DISTANCE, distinct, group, near_pairs
from memfree.data.identity import dataset_hash
from memfree.data.ingest import Ingested, ingest
from memfree.data.plan import DuplicationPlan
from memfree.data.records import Items, arrange
from memfree.data.shards import RECORDS_SCHEMA, ShardWriter, record_bytes
from memfree.data.sources import SourceName, open_source
from memfree.data.split import PARTS, PartSizes, deal
from memfree.data.workspace import put_in_place, unfinished
from memfree.manifest import check_free_space, read_manifest, write_manifest

_NO_COPIES = DuplicationPlan()
_DEFAULT_SIZES = PartSizes()


def prepare(
    out: Path,
    source: SourceName = "digits",
    path: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    resize: Resize = "crop",
    interpolation: Filter = "bicubic",
    channels: Literal[1, 2, 3, 4] | None = None,
    parts: PartSizes = _DEFAULT_SIZES,
    plan: DuplicationPlan = _NO_COPIES,
    seed: int = 0,
    near_distance: float = DEFAULT_DISTANCE,
    records_per_shard: int = 2000,
    on_error: Literal["stop", "skip"] = "stop",
    licence: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a dataset folder: shards for training, three held-out parts, and what was done.

    Exact and near duplicates in the source are grouped first; whole groups are dealt out to the
    parts; then the planned copies are added to the training part. The folder appears when it is
    complete; a run that was stopped begins again. The same arguments give the same bytes.

    Args:
        out: the dataset folder.
        source: digits (bundled with scikit-learn), cifar10 (downloaded by torchvision), folder
            (images in class folders, or with captions in .txt files beside them) or shards
            (WebDataset tars, for instance img2dataset's).
        path: the image folder, or the shards: a folder, a file, a glob, or addresses with braces.
        image_size: height and width of all images, one number for a square; without it all
            images must have the same size.
        resize: crop keeps the centre, squash scales both sides, pad adds black borders.
        interpolation: how pixels are resized, always antialiased.
        channels: 1 grey, 2 grey with alpha, 3 RGB, 4 RGBA; without it all images must have as
            many as the first.
        parts: images of each part.
        plan: which training images are repeated, and how.
        seed: of the split and the order.
        near_distance: largest distance of near duplicates, see memfree.data.grouping; 0 groups
            exact duplicates only.
        records_per_shard: records in each tar.
        on_error: stop at the first broken image, or skip and count it.
        licence: terms of the images, kept in the manifest; default: what the source says.
        overwrite: replace the dataset folder that is there.

    Raises:
        ValueError: an option is wrong, or ``out`` holds something else.
        OSError: the source is not there, a file is damaged, or the disk is full.
    """
    if records_per_shard < 1:
        raise ValueError(f"--records_per_shard {records_per_shard}: use 1 or more")
    height, width = (image_size, image_size) if not isinstance(image_size, tuple) else image_size
    if height is not None and width is not None and min(height, width) < 1:
        raise ValueError(f"--image_size {image_size}: use 1 or more")
    recipe = {
        "source": source,
        "path": path,
        "framing": [height, width, channels, resize, interpolation],
        "parts": dataclasses.asdict(parts),
        "plan": dataclasses.asdict(plan),
        "seed": seed,
        "near_distance": near_distance,
        "records_per_shard": records_per_shard,
        "on_error": on_error,
        "licence": licence,
    }
    recipe = json.loads(json.dumps(recipe))
    console = Console(stderr=True)
    if _is_done(out, recipe, overwrite):
        console.print(f"{out} is already prepared in this way", soft_wrap=True)
        return
    opened = open_source(source, path)
    count, size = opened.size
    framing = Framing(height, width, channels, resize, interpolation)
    values = (height or 1) * (width or 1) * (channels or 3)
    check_free_space(out, count * (values + record_bytes(values)) + size)

    with unfinished(out) as folder, _progress(console) as progress:
        skipped: list[str] = []
        reading = progress.add_task("read", total=count or None)
        data = ingest(
            opened,
            framing,
            folder / "pixels.tmp",
            skipped.append if on_error == "skip" else None,
            lambda name: progress.advance(reading),
        )
        progress.update(reading, total=len(data.names))
        counts = parts.counts(len(data.names), opened.default_sizes)

        comparing = progress.add_task("compare", total=len(data.names))
        image_of, first = distinct(data.pixels)
        pairs = near_pairs(
            data.pixels if len(first) == len(data.pixels) else data.pixels[first],
            near_distance,
            lambda done, total: progress.update(comparing, completed=done, total=total),
        )
        progress.update(comparing, completed=len(first), total=len(first))
        group_of = _groups(data, image_of, pairs)
        sizes = np.bincount(group_of[image_of])
        part_of = deal(sizes, counts, seed)
        items = arrange(
            data, image_of, group_of, part_of, plan, data.num_classes(opened.class_names), seed
        )
        for part in PARTS:
            if counts[part] and not items.records[part]:
                raise ValueError(
                    f"no group of images is small enough for --parts.{part} {counts[part]}; "
                    "make it larger or lower --near_distance"
                )

        total = sum(len(records) for records in items.records.values())
        check_free_space(folder, total * record_bytes(int(np.prod(data.pixels.shape[1:]))))
        writing = progress.add_task("write", total=total)
        writer = _write_shards(folder, items, data, records_per_shard, progress, writing)
        _write_tables(folder, items, writer)
        kept = Counter(items.groups)
        fields = {
            "hash": dataset_hash(
                {shard.name: shard.sha256 for shard in writer.shards},
                items.keys,
                items.groups,
                items.copies(),
            ),
            "recipe": recipe,
            "source": {"name": source, "path": path, "licence": licence or opened.licence},
            "image_shape": [int(side) for side in data.pixels.shape[1:]],
            "num_classes": items.num_classes,
            "class_names": opened.class_names,
            "captions": data.captions is not None,
            "plan": recipe["plan"],
            "parts": {
                part: {
                    "records": len(items.records[part]),
                    "images": items.parts.count(part),
                    "groups": len(
                        {g for g, p in zip(items.groups, items.parts, strict=True) if p == part}
                    ),
                    "requested": counts[part],
                }
                for part in PARTS
            },
            "grouping": {
                "source_images": len(data.names),
                "exact_duplicates": len(data.names) - len(first),
                "near_pairs": len(pairs),
                "largest_source_group": int(sizes.max()),
                "largest_group": max(kept.values()),
                "left_out": int(
                    sum(sizes[number] for number, p in enumerate(part_of) if p is None)
                ),
            },
            "repeated_images": items.repeated,
            "skipped": {"count": len(skipped), "first": skipped[:20]},
            "shards": {
                shard.name: {
                    "records": shard.records,
                    "bytes": shard.bytes,
                    "sha256": shard.sha256,
                }
                for shard in writer.shards
            },
        }
        del data
        (folder / "pixels.tmp").unlink()
        write_manifest(folder, "dataset", seed, **fields)
        put_in_place(folder, out, overwrite)
    sums = ", ".join(f"{part} {len(items.records[part])}" for part in PARTS)
    note = f"; {len(skipped)} broken images skipped, see its manifest" if skipped else ""
    console.print(f"{out}: records: {sums}{note}", soft_wrap=True)


def _is_done(out: Path, recipe: dict[str, Any], overwrite: bool) -> bool:
    """Whether ``out`` is there and was made like this; refuses to touch anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        manifest = read_manifest(out, "dataset")
    except (ValueError, OSError) as error:
        raise ValueError(
            f"--out {out} exists and is not a dataset folder; choose another"
        ) from error
    if manifest.get("recipe") == recipe and not overwrite:
        return True
    if not overwrite:
        raise ValueError(
            f"--out {out} holds another data set; choose another or say --overwrite true"
        )
    return False


def _groups(data: Ingested, image_of: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Group of each distinct image, from pairs of them and from what the source declares."""
    declared: list[str | None] = [None] * (int(image_of.max()) + 1)
    leader: dict[str, int] = {}
    links = [pairs]
    for source, image in enumerate(image_of.tolist()):
        name = data.groups[source]
        if name is None:
            continue
        if declared[image] is None:
            declared[image] = name
        links.append(np.array([[leader.setdefault(name, image), image]], np.int64))
    return group(len(declared), np.concatenate(links), declared)


def _write_shards(
    folder: Path,
    items: Items,
    data: Ingested,
    records_per_shard: int,
    progress: Progress,
    task: Any,
) -> ShardWriter:
    writer = ShardWriter(folder, records_per_shard)
    for part in PARTS:
        for record in items.records[part]:
            row = record.row
            pixels = items.near_copies.get(row)
            if pixels is None:
                pixels = np.asarray(data.pixels[items.sources[row]])
            writer.write(part, record, pixels, items.keys[row], items.groups[row])
            progress.advance(task)
    writer.close()
    return writer


def _write_tables(folder: Path, items: Items, writer: ShardWriter) -> None:
    """``items.parquet``, ``conditions.parquet`` and the index ``records.parquet``."""
    table = {
        "image_key": items.keys,
        "group": items.groups,
        "copies": pa.array(items.copies(), pa.int64()),
        "part": list(items.parts),
    }
    pq.write_table(pa.table(table), folder / "items.parquet")
    rows, labels, captions, counts = zip(*items.conditions(), strict=True)
    table = {
        "image_key": [items.keys[row] for row in rows],
        "label": pa.array(labels, pa.int64()),
        "caption": pa.array(captions, pa.string()),
        "count": pa.array(counts, pa.int64()),
        "part": [items.parts[row] for row in rows],
    }
    pq.write_table(pa.table(table), folder / "conditions.parquet")
    index = pa.table(writer.index, schema=RECORDS_SCHEMA)
    pq.write_table(index, folder / "records.parquet")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )
