"""``memfree audit``: find copies of indexed images among images from anywhere."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from jsonargparse.typing import OpenUnitInterval, PositiveInt
from rich.console import Console
from rich.table import Table

from memfree.console import plain_console, shown
from memfree.data.skipped import INCOMPLETE, LeftOut, Skipped
from memfree.data.split import DEFAULT_RATE
from memfree.folders.atomic import put_in_place, unfinished, write_text
from memfree.folders.claim import claim
from memfree.folders.manifest import save_config, write_manifest

TYPE_CHECKING = False  # not typing's, whose imports jsonargparse would run for --help
if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from memfree.data import DatasetFolder
    from memfree.evaluation.audited_images import AuditedImages
    from memfree.evaluation.neighbours import Neighbours
    from memfree.guidance import Calibration
    from memfree.retrieval import ReferenceIndex


@dataclass
class Audit:
    """The result of an audit, most suspicious images first."""

    table: pa.Table
    """One row per image; columns as in ``audit.parquet``."""
    pictures: Tensor
    """(≤ pairs, C, H, W) in [−1, 1]: the first images of the table."""
    facts: dict[str, str]
    warning: str
    """Why there cannot be any discoveries; empty where there can."""
    skipped: Skipped
    left_out: LeftOut


def audit(
    images: Path,
    index: Path,
    out: Path | None = None,
    dataset: Path | None = None,
    false_discovery_rate: OpenUnitInterval = 0.05,
    false_positive_rate: OpenUnitInterval = DEFAULT_RATE,
    pairs: PositiveInt = 40,
    batch_size: PositiveInt = 256,
) -> int:
    """Judge images from anywhere: is each a copy of an indexed image, and how sure is that?

    The p-value of an image is the share of held-out real images as near to the index. Discoveries
    hold over all images (Benjamini and Hochberg, at the false discovery rate); the verdict `copy`
    is of one image, at the false-positive rate. Images are scaled and cropped to the index's size.
    Exits with status 3 where pictures or shards could not be judged; they are named.

    Args:
        images: folder, image file, tar shards or sample folder; `memfree audit IMAGES` is enough.
        index: calibrated reference index folder.
        out: folder for audit.parquet and index.html, which shows images beside their nearest
            training images; default: only the printed table.
        dataset: dataset folder of the index, to show training images that the index lacks.
        false_discovery_rate: expected share of wrong discoveries.
        false_positive_rate: share of real images that the verdict on one image may call copies.
        pairs: most suspicious images on the page; half of them in the terminal.
        batch_size: images measured at a time.
    """
    from pyarrow import parquet

    from memfree.evaluation.inputs import open_index
    from memfree.evaluation.page import audit_page

    console = plain_console()
    if out is not None:
        claim(out, "audit")
    references, data = open_index(index, dataset)
    result = measure(
        references, images, false_discovery_rate, false_positive_rate, pairs, batch_size
    )
    # Write before printing: a terminal's encoding error must not lose the audit.
    if out is not None:
        keys = result.table["nearest_key"].to_pylist()[:pairs]
        nearest = _nearest_images(references, data, keys)
        with unfinished(out) as partial:
            parquet.write_table(result.table, partial / "audit.parquet")
            page = audit_page(result.table, result.pictures, nearest, result.facts, result.warning)
            write_text(partial / "index.html", page)
            save_config(partial)
            write_manifest(
                partial,
                "audit",
                images=shown(str(images)),
                index=str(index),
                false_discovery_rate=false_discovery_rate,
                false_positive_rate=false_positive_rate,
                facts=result.facts,
                skipped={**result.skipped.counts(), "first": result.skipped.messages},
                left_out=result.left_out.counts(),
                contains="index.html contains the images, and training images where available",
            )
            put_in_place(partial, out, overwrite=True)
    _print(result, max(1, pairs // 2), console)
    if out is not None:
        console.print(f"Written to {out}: audit.parquet and index.html.", soft_wrap=True)
    return INCOMPLETE if result.skipped else 0


def measure(
    index: ReferenceIndex,
    images: Path,
    false_discovery_rate: float,
    false_positive_rate: float = DEFAULT_RATE,
    pairs: int = 40,
    batch_size: int = 256,
) -> Audit:
    """Measure all images against the index; arguments as in ``audit``."""
    import torch

    from memfree.evaluation.audited_images import AuditedImages
    from memfree.evaluation.intervals import fewest_discoveries
    from memfree.evaluation.neighbours import Neighbours, find_neighbours
    from memfree.guidance import calibration_of, default_similarity

    similarity = default_similarity(index)
    calibration = calibration_of(index, similarity)
    calibration.threshold(false_positive_rate)  # refuses a wrong rate before reading
    source = AuditedImages(images, index.image_shape)
    names: list[str] = []
    parts: list[Neighbours] = []
    top, top_sigma = torch.empty(0, *index.image_shape), np.empty(0)
    for batch_names, batch in source.batches(batch_size):
        found = find_neighbours(
            index, similarity, calibration, batch, false_positive_rate, batch_size
        )
        names += batch_names
        parts.append(found)
        # Keep only the pictures shown; equal ones stay in order.
        top, top_sigma = torch.cat([top, batch]), np.concatenate([top_sigma, found.sigma])
        kept = np.argsort(-top_sigma, kind="stable")[:pairs]
        top, top_sigma = top[torch.from_numpy(kept)], top_sigma[kept]
    if not parts:
        raise ValueError(
            f"--images {shown(str(images))}: no image could be read; "
            f"{source.skipped.text('image')} ({source.skipped.named()})"
        )
    columns = [field.name for field in fields(Neighbours)]
    found = Neighbours(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in columns)
    )
    table = _table(names, found, index.keys, false_discovery_rate)
    discoveries = int(np.sum(table["discovery"].to_numpy()))
    fewest = fewest_discoveries(len(names), len(calibration.sigmas), false_discovery_rate)
    rates = (false_discovery_rate, false_positive_rate)
    facts = _facts(source, index, calibration, found, discoveries, fewest, rates)
    warning = "" if discoveries else _warning(found.p_value, len(calibration.sigmas), fewest)
    return Audit(table, top, facts, warning, source.skipped, source.left_out)


def _table(names: list[str], found: Neighbours, keys: list[str], rate: float) -> pa.Table:
    import pyarrow as pa

    from memfree.evaluation.intervals import adjusted, are_discoveries

    order = np.argsort(-found.sigma, kind="stable")
    q_value = adjusted(found.p_value)[order]
    return pa.table(
        {
            "image": pa.array([names[i] for i in order]),
            "nearest_key": pa.array([keys[found.row[i]] for i in order]),
            "nearest_row": found.row[order],
            "nearest_multiplicity": found.multiplicity[order],
            "sigma": found.sigma[order],
            "distance_ratio": found.distance_ratio[order],
            "p_value": found.p_value[order],
            "q_value": q_value,
            "copy": found.copy[order],
            "discovery": are_discoveries(q_value, rate),
        }
    )


def _facts(
    source: AuditedImages,
    index: ReferenceIndex,
    calibration: Calibration,
    found: Neighbours,
    discoveries: int,
    fewest: int,
    rates: tuple[float, float],
) -> dict[str, str]:
    shape = " × ".join(str(side) for side in index.image_shape)
    n, (discovery_rate, rate) = len(calibration.sigmas), rates
    skipped = [source.skipped.text("image"), *source.skipped.messages]
    facts = {
        "Images": f"{len(found)} from {shown(str(source.path))}",
        "Index": f"{len(index)} distinct images of {shape}, "
        f"{index.features.describe()['name']}, similarity {calibration.similarity}",
        "Discoveries": f"{discoveries} at a false discovery rate of {100 * discovery_rate:g} % "
        "(Benjamini–Hochberg)",
        "Smallest p-value": f"1/{n + 1}, with {n} calibration images; so there are either no "
        f"discoveries or at least {fewest}",
        "Resized": f"{source.changed} images of another size or number of channels were scaled and "
        f"cropped to {shape}"
        if source.changed
        else "",
        "Frames": f"{source.frames} images are frames of animated files, each judged alone"
        if source.frames
        else "",
        "Left out": "; ".join(skipped) if source.skipped else "",
        "Other files": source.left_out.text() if source.left_out else "",
        "Verdict": f"{int(found.copy.sum())} copies: σ above {calibration.threshold(rate):.3f}, "
        f"which {calibration.rate_text(rate)} of real images are; "
        f"{rate * len(found):.1f} such images are expected where none is a copy",
    }
    return {name: text for name, text in facts.items() if text}


def _warning(p_value: np.ndarray, n: int, fewest: int) -> str:
    """Why n calibration images may allow no discovery; empty where the result speaks for itself."""
    if fewest > len(p_value):
        return (
            f"No discovery is possible: with {n} calibration images no p-value is below 1/{n + 1}. "
            "Calibrate on more images, or audit at a higher false discovery rate."
        )
    nearest = int((p_value <= 1 / (n + 1) + 1e-12).sum())
    if not nearest:
        return ""
    return (
        f"{nearest} of the images are nearer than all {n} calibration images, but among "
        f"{len(p_value)} it takes at least {fewest} such for a discovery: calibrate on more "
        "images. An audit in portions would find more, and more that are not copies."
    )


def _print(result: Audit, rows: int, console: Console) -> None:
    table = Table("image", "nearest", title="Most suspicious first", title_justify="left")
    for name in ("σ", "p", "q", "copy", "discovery"):
        table.add_column(name, justify="right")
    for row in result.table.slice(0, rows).to_pylist():
        numbers = f"{row['sigma']:.3f}", f"{row['p_value']:.4f}", f"{row['q_value']:.4f}"
        verdicts = ("yes" if row[name] else "no" for name in ("copy", "discovery"))
        table.add_row(row["image"], row["nearest_key"], *numbers, *verdicts)
    console.print(table)
    for name, text in result.facts.items():
        console.print(f"{name}: {text}", highlight=False, soft_wrap=True)
    if result.warning:
        console.print(f"Warning: {result.warning}", style="yellow", soft_wrap=True)


def _nearest_images(
    index: ReferenceIndex, data: DatasetFolder | None, keys: list[str]
) -> dict[str, Tensor]:
    """Training images by key, where the index or the dataset holds them."""
    import torch

    from memfree.evaluation.writer import training_images
    from memfree.retrieval import PixelFeatures

    if isinstance(index.features, PixelFeatures):
        places = {key: row for row, key in enumerate(index.keys)}
        wanted = list(dict.fromkeys(keys))
        images = index.images(torch.tensor([places[key] for key in wanted]))
        return dict(zip(wanted, images.clamp(-1, 1), strict=True))
    return {} if data is None else training_images(data, set(keys))
