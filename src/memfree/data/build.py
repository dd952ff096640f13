"""Build a dataset folder: ingest, group, split, duplicate, write shards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import Progress

from memfree.data.dataset_folder import dataset_hash
from memfree.data.duplication_plan import DuplicationPlan
from memfree.data.ingest import Framing
from memfree.data.options import LabelPolicy
from memfree.data.skipped import Skipped
from memfree.data.split import PARTS, PartName, PartSizes, deal, limited
from memfree.folders.atomic import check_free_space

if TYPE_CHECKING:
    from memfree.data.ingest import Ingested
    from memfree.data.records import Items
    from memfree.data.shard_writer import ShardWriter
    from memfree.data.sources import Source


def build(
    folder: Path,
    source: Source,
    framing: Framing,
    parts: PartSizes,
    plan: DuplicationPlan,
    seed: int,
    near_distance: float,
    records_per_shard: int,
    skipped: Skipped | None,
    progress: Progress,
    limit: int = 0,
    labels: LabelPolicy = "own",
) -> dict[str, Any]:
    """Read, group, split, repeat, write; see :func:`memfree.commands.prepare.prepare`.

    Returns:
        What the manifest says of the result.
    """
    from memfree.data.ingest import ingest
    from memfree.data.records import arrange
    from memfree.data.shard_writer import record_bytes

    scratch = folder / "pixels.tmp"
    task = progress.add_task("read", total=source.size[0] or None)
    data = ingest(
        source,
        framing,
        scratch,
        skipped,
        lambda name: progress.advance(task),
    )
    count = len(data.names)
    progress.update(task, total=count)
    counts = parts.counts(count, source.default_sizes)

    image_of, pairs = _compare(data, near_distance, progress)
    group_of = _groups(data, image_of, pairs)
    family_of = _families(data, group_of[image_of])
    sizes = np.bincount(group_of[image_of])
    family_sizes = np.bincount(family_of, sizes).astype(np.int64)
    part_of_family = deal(family_sizes, counts, seed)
    if limit:
        part_of_family = limited(part_of_family, family_sizes, limit, seed)
    part_of = [part_of_family[family] for family in family_of.tolist()]
    classes = data.num_classes(source.class_names)
    items = arrange(data, image_of, group_of, part_of, plan, classes, seed, labels)
    for part in PARTS:
        if counts[part] and not items.records[part]:
            raise ValueError(
                f"no group of images is small enough for --parts.{part} {counts[part]}; "
                "make it larger or lower --near_distance"
            )

    total = sum(len(records) for records in items.records.values())
    check_free_space(folder, total * record_bytes(int(np.prod(data.pixels.shape[1:]))))
    writer = _write_shards(folder, items, data, records_per_shard, progress)
    _write_tables(folder, items, writer)
    shards = {shard.name: shard.sha256 for shard in writer.shards}
    facts: dict[str, Any] = {
        "source_hash": data.source_hash,
        "hash": dataset_hash(shards, items.keys, items.groups, items.copies()),
        "image_shape": [int(side) for side in data.pixels.shape[1:]],
        "num_classes": items.num_classes,
        "class_names": source.class_names,
        "captions": data.captions is not None,
        "parts": {part: _part_facts(items, part, counts[part]) for part in PARTS},
        "grouping": {
            "source_images": count,
            "exact_duplicates": count - len(group_of),
            "near_pairs": len(pairs),
            "largest_group": int(sizes.max()),
            "largest_family": int(family_sizes.max()),
            "left_out": int(sum(sizes[number] for number, p in enumerate(part_of) if p is None)),
        },
        "repeated_images": items.repeated,
        "left_out": source.left_out.counts(),
        "skipped": {
            "images": skipped.records if skipped else 0,
            "shards": sorted(skipped.shards) if skipped else [],
            "first": skipped.messages if skipped else [],
        },
        "shards": {
            shard.name: {"records": shard.records, "bytes": shard.bytes, "sha256": shard.sha256}
            for shard in writer.shards
        },
    }
    del data  # the scratch file is mapped
    scratch.unlink()
    return facts


def _compare(
    data: Ingested, near_distance: float, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Distinct image of each source image, and near duplicates among the distinct ones."""
    from memfree.data.duplicates import distinct, near_pairs

    task = progress.add_task("compare", total=len(data.names))
    image_of, first = distinct(data.pixels)
    pairs = near_pairs(
        data.pixels if len(first) == len(data.pixels) else data.pixels[first],
        near_distance,
        lambda done, total: progress.update(task, completed=done, total=total),
    )
    progress.update(task, completed=len(first), total=len(first))
    return image_of, pairs


def _part_facts(items: Items, part: PartName, requested: int) -> dict[str, int]:
    rows = [row for row, name in enumerate(items.parts) if name == part]
    return {
        "records": len(items.records[part]),
        "images": len(rows),
        "groups": len({items.groups[row] for row in rows}),
        "requested": requested,
    }


def _groups(data: Ingested, image_of: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Group of each distinct image, from pairs of them and from what the source declares."""
    from memfree.data.duplicates import group

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


def _families(data: Ingested, group_of: np.ndarray) -> np.ndarray:
    """(G,) family of each group: groups that share an image of one family stay together."""
    from memfree.data.duplicates import group

    none = np.empty((0, 2), np.int64)
    leader: dict[str, int] = {}
    links = [
        (leader.setdefault(family, number), number)
        for family, number in zip(data.families, group_of.tolist(), strict=True)
        if family is not None
    ]
    pairs = np.array(links, np.int64) if links else none
    count = int(group_of.max()) + 1
    return group(count, pairs, [None] * count)


def _write_shards(
    folder: Path,
    items: Items,
    data: Ingested,
    records_per_shard: int,
    progress: Progress,
) -> ShardWriter:
    from memfree.data.shard_writer import ShardWriter

    total = sum(len(records) for records in items.records.values())
    task = progress.add_task("write", total=total)
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
    import pyarrow as pa
    import pyarrow.parquet as pq

    from memfree.data.shard_writer import RECORDS_SCHEMA

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
