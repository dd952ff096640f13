"""``memfree index``: build and calibrate the reference index of a dataset folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console
from rich.table import Table

from memfree.console import counting_bar, plain_console, quiet, say
from memfree.data import DatasetFolder
from memfree.data.split import DEFAULT_RATE, MIN_EXPECTED, too_few_images
from memfree.folders.atomic import check_free_space, refuse_mount_point
from memfree.folders.lock import ALL, Part, one_at_a_time, part_of
from memfree.models.options import Devices
from memfree.retrieval.options import ExtractorOptions, FeatureName
from memfree.slurm.launcher import is_first_process

TYPE_CHECKING = False  # not typing's, whose imports jsonargparse would run for --help
if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from memfree.guidance.calibration import Calibration
    from memfree.retrieval import Features, ReferenceIndex
    from memfree.retrieval.embed import EmbeddedParts


def summary(index: ReferenceIndex) -> Table:
    """Table of the rows, groups, records and duplicated groups of an index."""
    import torch

    totals = torch.zeros(int(index.group.max()) + 1, dtype=torch.int64)
    totals[index.group.cpu()] = index.group_multiplicity.cpu()
    repeated = int((totals > 1).sum())
    table = Table(title="Reference index", title_justify="left")
    for column in ("distinct images", "groups", "training records", "duplicated groups"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{len(index):,}",
        f"{len(totals):,}",
        f"{int(totals.sum()):,}",
        f"{repeated:,}" + (f" (up to {int(totals.max()):,} records)" if repeated else ""),
    )
    return table


def thresholds(calibration: Calibration) -> Table:
    """Table of thresholds at 5 %, 1 % and the smallest rate that n images allow."""
    n = len(calibration.sigmas)
    smallest = MIN_EXPECTED / n
    distance = calibration.similarity.startswith("nl2")
    table = Table(
        title=f"An image is called a copy if σ ({calibration.similarity}) is above",
        caption=f"from {n:,} held-out images" + ("; nL2 is −σ" if distance else ""),
        title_justify="left",
        caption_justify="left",
    )
    for column in ("false positives", "threshold on σ", "95 % interval"):
        table.add_column(column, justify="right")
    for rate in sorted({0.05, DEFAULT_RATE, smallest}, reverse=True):
        if smallest <= rate < 1:
            low, high = calibration.threshold_interval(rate)
            threshold = calibration.threshold(rate)
            table.add_row(f"{100 * rate:.3g} %", f"{threshold:.3f}", f"{low:.3f} … {high:.3f}")
    return table


_QUIET = (  # Lightning's warnings that do not apply: on resumption a rank may have nothing to do
    "Total length of .* across ranks is zero.*",
    ".*does not have many workers.*",
    ".*DataLoader.*only sampled.*",
)


@dataclass(frozen=True)
class EmbeddingDevices(Devices):
    """Where images are embedded: options of the Lightning Trainer."""

    devices: int | str = 1
    """Number of devices, or auto; each has its own process."""
    strategy: str = "auto"
    """auto or ddp: images are divided among the devices."""


def index(
    dataset: Path,
    out: Path,
    features: FeatureName = "pixels",
    extractor: ExtractorOptions = ExtractorOptions(),  # noqa: B008 - read only; --help shows it
    whiten: bool = False,
    batch_size: PositiveInt = 256,
    workers: NonNegativeInt = 0,
    hash_keys: bool = False,
    salt_file: Path | None = None,
    part: str = ALL,
    trainer: EmbeddingDevices = EmbeddingDevices(),  # noqa: B008
    overwrite: bool = False,
) -> None:
    """Index the training images of a dataset folder and calibrate thresholds on held-out images.

    Copies of an image become one row with their number; the calibration part, never trained on,
    gives thresholds at stated false-positive rates. The index holds training images or their
    features: treat it like the training set. With a network the same command resumes a killed run.

    Args:
        dataset: folder that `memfree prepare` wrote.
        out: folder of the index; one of the same dataset and features is replaced.
        features: pixels (normalized L2 distance); efficientnet (EfficientNet-Lite0, pretrained on
            ImageNet), sscd (copy detection), clip (open_clip) or timm (any of its networks): cosine
            similarity; latents (of a VAE, L2 distance); copy_detection (of `memfree
            train-embedding`, cosine similarity).
        extractor: options of the features.
        whiten: whiten a network's features on the fit part: spreads small or uniform images out.
        batch_size: images to embed at a time.
        workers: processes that read and decode images, for each process that embeds.
        hash_keys: for parties who may not hold the images: keys are hashed with the salt, captions
            and shard names left out. Not for pixels or latents.
        salt_file: file with the salt, to be kept secret; written if it does not exist.
        part: all, or a part of the batches as 3/8 (the third of eight), for concurrent jobs on one
            dataset; the one that finds all embedded writes the index.
        trainer: devices of a network's features.
        overwrite: also replace an index of another dataset or of other features.
    """
    import torch

    from memfree.out_of_memory import explained_memory
    from memfree.retrieval import ReferenceIndex
    from memfree.retrieval.features.make import HAVE_DTYPE, make_features
    from memfree.retrieval.index_folder import claim_index, read_salt

    work = part_of(part)
    pixels, shown = features == "pixels", features in ("pixels", "latents")
    network = "needs --features of a network: pixels are not embedded"
    refusals = [
        (
            whiten and shown,
            f"--whiten true is for networks, as --features efficientnet, not for {features}",
        ),
        (hash_keys and shown, f"--hash_keys true needs other --features: {features} show images"),
        (hash_keys and salt_file is None, "--hash_keys true needs --salt_file"),
        (pixels and trainer != EmbeddingDevices(), f"--trainer.* {network}"),
        (pixels and not work.whole, f"--part {network}"),
        (
            overwrite and not work.whole,
            "--part and --overwrite true exclude each other: delete --out, or choose",
        ),
    ]
    for applies, message in refusals:
        if applies:
            raise ValueError(message)
    refuse_mount_point(out)
    if salt_file is not None and salt_file.exists():
        read_salt(salt_file)  # refuses a wrong file before the work
    folder = DatasetFolder(dataset)
    training, calibration = folder.part("train"), folder.part("calibration")
    extract = make_features(features, extractor)
    vectors = extract.embed(torch.zeros(1, *folder.image_shape)).numel() * len(training.keys) * 4
    # A network's vectors are on disk twice, as parts and in the index.
    check_free_space(out, vectors * (1 if pixels else 2) + 100 * len(training.keys))

    console = plain_console(stderr=True)
    less_memory = [f"a smaller --batch_size (now {batch_size})"] if batch_size > 1 else []
    if features in HAVE_DTYPE and extractor.dtype == "float32":
        less_memory.append("--extractor.dtype bfloat16")
    if not pixels and trainer.accelerator != "cpu":
        less_memory.append("--trainer.accelerator cpu")

    def write(built: ReferenceIndex) -> None:
        with explained_memory("calibrating", less_memory):
            on_gpu = torch.cuda.is_available() and trainer.accelerator != "cpu"
            built.to("cuda" if on_gpu else "cpu")
            calibrated = _calibrate(built, folder, batch_size, console)
            kept = built.hashed(read_salt(salt_file)) if hash_keys and salt_file else built
            kept.save(out, overwrite)
        plain_console().print(summary(built), thresholds(calibrated))
        if warning := too_few_images(len(calibration.keys)):
            console.print(f"{out}: {warning}", soft_wrap=True)

    with explained_memory("indexing", less_memory):
        if pixels:
            claim_index(out, folder.hash, extract.describe(), overwrite)
            with counting_bar(console) as progress:
                task = progress.add_task("index", total=len(training.keys))
                advance = partial(progress.advance, task)
                built = ReferenceIndex.build(
                    folder, extract, batch_size=batch_size, advance=advance
                )
            write(built)
            return
        extract, parts = _embed(
            folder, extract, out, whiten, batch_size, workers, work, trainer, overwrite, console
        )
        if not is_first_process():
            return
        with one_at_a_time(out, work):
            wanted = out, folder.hash, extract.describe(), overwrite
            if not work.whole and claim_index(*wanted) == "finished":  # another part wrote it
                say(f"{out} is finished")
            elif missing := parts.missing():
                say(f"{out}: part {part} is embedded; {len(missing)} batches of others are not")
                return
            else:
                write(ReferenceIndex.of_embedded(folder, extract, parts.read()))
            parts.forget()


def _calibrate(
    index: ReferenceIndex, folder: DatasetFolder, batch_size: int, console: Console
) -> Calibration:
    """Store with the index how near held-out images are to it by its own similarity."""
    from memfree.guidance.calibration import calibration_of, default_similarity, measure

    images = folder.part("calibration")
    similarity = default_similarity(index)
    with counting_bar(console) as progress:
        task = progress.add_task("calibrate", total=None)
        measured = measure(index, similarity, images.images(), batch_size)
        index.calibrations[similarity.name] = measured.to_json()
        progress.update(task, total=len(images.keys), completed=len(images.keys))
    return calibration_of(index, similarity)


def _embed(
    folder: DatasetFolder,
    features: Features,
    out: Path,
    whiten: bool,
    batch_size: int,
    workers: int,
    work: Part,
    devices: EmbeddingDevices,
    overwrite: bool,
    console: Console,
) -> tuple[Features, EmbeddedParts]:
    """Embed the train part, or this part of the work; returns the extractor and the batches."""
    # Imported here: Lightning takes seconds, and pixels do not need it.
    from memfree.retrieval.embed import EmbeddedParts, embed, parts_folder, whitened
    from memfree.retrieval.index_folder import claim_index
    from memfree.training.trainer import build_trainer

    with quiet(*_QUIET):
        lightning: Trainer = build_trainer(
            **asdict(devices),
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    root = parts_folder(out)
    if whiten:
        with one_at_a_time(out, work):
            device = lightning.strategy.root_device
            features = whitened(folder, features, root, batch_size, device)
    state = claim_index(out, folder.hash, features.describe(), overwrite)
    images = folder.part("train")
    parts = EmbeddedParts(root, features, folder, len(images), batch_size)
    if not work.whole and state == "finished":
        return features, parts
    bar = counting_bar(console if is_first_process() else plain_console(quiet=True))
    with quiet(*_QUIET), bar as progress:
        # The first process counts its own share; all are of equal size.
        rows = sum(len(parts.rows(batch)) for batch in parts.missing(work))
        task = progress.add_task("embed", total=rows)
        embed(
            images,
            features,
            parts,
            lightning,
            workers,
            lambda count: progress.advance(task, count * lightning.world_size),
            work,
        )
    return features, parts
