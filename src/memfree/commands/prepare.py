"""``memfree prepare``: turn a source into a dataset folder with declared duplication."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt

from memfree.console import counted, counting_bar, plain_console
from memfree.data.dataset_folder import SourceHash, files_hash
from memfree.data.duplication_plan import DuplicationPlan
from memfree.data.options import (
    DEFAULT_DISTANCE,
    Filter,
    LabelPolicy,
    RecordOptions,
    Resize,
    SourceName,
)
from memfree.data.skipped import INCOMPLETE, LeftOut, Skipped
from memfree.data.split import PARTS, PartSizes, too_few_images
from memfree.folders.atomic import check_free_space, put_in_place, unfinished
from memfree.folders.claim import claim
from memfree.folders.manifest import read_manifest, save_config, write_manifest

TYPE_CHECKING = False  # not typing's, whose imports jsonargparse would run for --help
if TYPE_CHECKING:
    from memfree.data.sources import Source

_NO_COPIES = DuplicationPlan()
_DEFAULT_SIZES = PartSizes()
_NO_CHOICE = RecordOptions()


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
    seed: NonNegativeInt = 0,
    near_distance: NonNegativeFloat = DEFAULT_DISTANCE,
    records_per_shard: int = 2000,
    on_error: Literal["stop", "skip"] = "stop",
    licence: str | None = None,
    emoji_variants: bool = False,
    limit: NonNegativeInt = 0,
    labels: LabelPolicy = "own",
    records: RecordOptions = _NO_CHOICE,
    overwrite: bool = False,
) -> int:
    """Write a dataset folder: shards for training, three held-out parts, and a manifest.

    Groups of exact and near duplicates stay in one part; planned copies are added to the training
    part. The folder appears complete; a stopped run starts over. The same arguments give the same
    bytes. Exits with status 3 where broken pictures or shards were skipped; they are named.

    Args:
        out: the dataset folder.
        source: digits (bundled with scikit-learn), cifar10 (downloaded by torchvision), emoji (an
            installed colour font, captioned with Unicode names), folder (images in class folders,
            or with captions in .txt or .caption files beside them or in metadata.jsonl or
            metadata.csv) or shards (WebDataset tars, for instance img2dataset's).
        path: the image folder; the shards: a folder, a file, a glob, or addresses with braces; or
            the font of emoji, if not the installed Noto Color Emoji.
        image_size: height and width, or one number for a square; default: all must have one size.
        resize: crop keeps the centre, squash scales both sides, pad adds black borders.
        interpolation: how pixels are resized, always antialiased.
        channels: 1 grey, 2 grey with alpha, 3 RGB, 4 RGBA; default: the first image's, for all.
        parts: images of each part.
        plan: which training images are repeated, and how.
        seed: for the split and the order.
        near_distance: largest distance of near duplicates, which stay in one part: 0 for the same
            picture, 1.41 for unrelated ones, up to 0.15 for one that was re-encoded, mirrored or
            brightened; a crop by a few pixels may need 0.3. 0 groups exact duplicates only.
        records_per_shard: records in each tar.
        on_error: stop at the first broken image or missing shard, or skip and count it.
        licence: terms of the images, kept in the manifest; default: what the source says.
        emoji_variants: include skin tones and gender signs, each in the group of its emoji.
        limit: train on N training images (0: all), a subset of any larger limit's; the held-out
            parts do not change.
        labels: own: the source's; random: each training image gets one of the source's labels at
            random; unique: each gets a label of its own. With the last two, copies share their
            image's label (see plan) and held-out images have none.
        records: which files of a folder or of shards to use where there is a choice.
        overwrite: replace an existing dataset folder.
    """
    from memfree.data.ingest import open_source
    from memfree.data.shard_writer import record_bytes

    if records_per_shard < 1:
        raise ValueError(f"--records_per_shard {records_per_shard}: use 1 or more")
    if not near_distance < math.inf:
        raise ValueError(f"--near_distance {near_distance}: use a number")
    height, width = (image_size, image_size) if not isinstance(image_size, tuple) else image_size
    if height is not None and width is not None and min(height, width) < 1:
        raise ValueError(f"--image_size {image_size}: use 1 or more")
    recipe: dict[str, Any] = {
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
    # Absent if default, so that recipes of earlier versions stay valid.
    later: dict[str, Any] = {"emoji_variants": emoji_variants, "limit": limit}
    if labels != "own":
        later["labels"] = labels
    if records != _NO_CHOICE:
        later["records"] = dataclasses.asdict(records)
    recipe |= {name: value for name, value in later.items() if value}
    recipe = json.loads(json.dumps(recipe))
    console = plain_console(stderr=True)
    identity = None if overwrite else recipe  # rebuild, even from the same recipe
    reopen = partial(open_source, source, path, emoji_variants, records)
    if claim(out, "dataset", identity, overwrite, lambda known: known.get("recipe")) == "finished":
        _check_whole(out)
        if source in ("emoji", "folder", "shards"):
            _check_source(out, source, path, reopen, on_error)
        status = _status(read_manifest(out, "dataset").get("skipped"))
        note = "; images or shards were skipped, see its manifest" if status else ""
        console.print(f"{out} is already prepared in this way{note}", soft_wrap=True)
        return status
    opened = reopen()
    from memfree.data.build import build
    from memfree.data.ingest import Framing

    listed = files_hash(opened.files)  # before reading, to notice changes meanwhile
    count, size = opened.size
    framing = Framing(height, width, channels, resize, interpolation)
    values = (height or 1) * (width or 1) * (channels or 3)
    check_free_space(out, count * (values + record_bytes(values)) + size)

    skipped = Skipped() if on_error == "skip" else None
    with unfinished(out) as folder, counting_bar(console) as progress:
        facts = build(
            folder,
            opened,
            framing,
            parts,
            plan,
            seed,
            near_distance,
            records_per_shard,
            skipped,
            progress,
            limit,
            labels,
        )
        save_config(folder)
        about = {
            "name": source,
            "path": path,
            "licence": licence or opened.licence,
            "size": opened.size,
            "files_hash": listed,
            "hash": facts.pop("source_hash"),
        }
        write_manifest(
            folder, "dataset", seed, source=about, plan=recipe["plan"], recipe=recipe, **facts
        )
        put_in_place(folder, out, overwrite)
    if warning := too_few_images(facts["parts"]["calibration"]["images"]):
        console.print(f"{out}: {warning}", soft_wrap=True)
    console.print(f"{out}: {_result(facts, skipped, opened.left_out)}", soft_wrap=True)
    return _status(facts["skipped"])


def _status(skipped: Any) -> int:
    lost = isinstance(skipped, dict) and (skipped.get("images") or skipped.get("shards"))
    return INCOMPLETE if lost else 0


def _result(facts: dict[str, Any], skipped: Skipped | None, other: LeftOut) -> str:
    """Records of each part, and what is in none of them."""
    sums = ", ".join(f"{part} {facts['parts'][part]['records']}" for part in PARTS)
    notes = [f"records: {sums}"]
    if skipped:
        notes.append(f"{skipped.text('image')}, see its manifest ({skipped.named()})")
    if other:
        notes.append(other.text())
    left_out = facts["grouping"]["left_out"]
    if left_out:
        images = counted(facts["grouping"]["source_images"], "image")
        notes.append(f"{left_out} of {images} left out, in no part")
    return "; ".join(notes)


def _check_whole(out: Path) -> None:
    """Refuse to call a folder finished that has since lost files or had them changed."""
    from memfree.data.dataset_folder import DatasetFolder

    try:
        folder = DatasetFolder(out)
        _ = folder.records, folder.conditions
    except (ValueError, OSError) as error:
        raise ValueError(f"--out {out} is damaged, pass --overwrite true: {error}") from error


def _check_source(
    out: Path,
    source: SourceName,
    path: str | None,
    reopen: Callable[[], Source],
    on_error: Literal["stop", "skip"],
) -> None:
    """Refuse to call a folder finished whose source has changed; the source may be gone."""

    def changed(error: Exception | None = None) -> ValueError:
        option = f"--path {path}" if path is not None else f"--source {source}"
        reason = "" if error is None else f" ({error})"
        return ValueError(
            f"{option} changed after {out} was prepared{reason}; choose another --out or pass "
            "--overwrite true"
        )

    try:
        opened = reopen()
    except FileNotFoundError as error:
        if path is None or not os.path.exists(path):
            return
        raise changed(error) from error
    about = read_manifest(out, "dataset").get("source")
    about = about if isinstance(about, dict) else {}
    same = list(opened.size) == about.get("size")  # earlier versions wrote only this
    if same and "hash" in about and files_hash(opened.files) != about.get("files_hash"):
        digest = SourceHash()
        try:
            for image in opened.images(Skipped() if on_error == "skip" else None):
                digest.add(image)
        except (ValueError, OSError) as error:
            raise changed(error) from error
        same = digest.hexdigest(opened.class_names) == about["hash"]
    if not same:
        raise changed()
