"""``memfree train-embedding``: train a copy-detection embedding on a dataset's images."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt

from memfree.console import say
from memfree.data import DatasetFolder
from memfree.data.split import PartName
from memfree.folders.claim import claim
from memfree.folders.manifest import sha256, write_manifest
from memfree.models.options import Accelerator, CopyDetectionOptions

PARTS: tuple[PartName, ...] = ("train", "fit")
"""Never calibration or test, where thresholds and rates are measured."""


def train_embedding(
    dataset: Path,
    out: Path,
    model: CopyDetectionOptions = CopyDetectionOptions(),  # noqa: B008 - read only; --help shows it
    size: PositiveInt = 32,
    widths: tuple[PositiveInt, ...] = (32, 64, 128),
    dimension: PositiveInt = 128,
    steps: PositiveInt = 700,
    batch_size: PositiveInt = 64,
    seed: NonNegativeInt = 0,
    accelerator: Accelerator = "auto",
    overwrite: bool = False,
) -> None:
    """Train a small copy-detection embedding on the images of a dataset folder.

    SSCD's recipe (Pizzi et al., CVPR 2022): embeddings of changed copies of an image agree, others
    spread out. For data without a working copy detector, such as icons of 32 pixels. It sees the
    distinct train and fit images only: `memfree index --features copy_detection --extractor.path
    OUT` calibrates it on unseen images. Judge a mitigation that it guides by another
    measure. Takes minutes.

    Args:
        dataset: folder that `memfree prepare` wrote.
        out: folder to write.
        model: loss, optimizer, and which changes still count as a copy.
        size: height and width, in pixels, that images are resized to.
        widths: channels of each resolution, half the size first; multiples of 8.
        dimension: length of the embedding.
        steps: optimizer steps.
        batch_size: images of a step, each a negative example for the others.
        seed: seed of weights, order and augmentation.
        accelerator: device to train on.
        overwrite: replace another embedding in out.
    """
    import safetensors.torch

    from memfree.offline.copy_detection import CopyDetectionModule
    from memfree.offline.short_training import DistinctImages, fit, write_folder
    from memfree.retrieval.features.copy_detection import WEIGHTS, CopyDetectionShape

    folder = DatasetFolder(dataset)
    channels = folder.image_shape[0]
    shape = CopyDetectionShape.from_json(
        {"channels": channels, "size": size, "widths": list(widths), "dimension": dimension}
    )
    identity = {
        "dataset_hash": folder.hash,
        "model": json.loads(json.dumps(asdict(model))),
        "shape": shape.to_json(),
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
    }
    if claim(out, "embedding", identity, overwrite) == "finished":
        say(f"{out} is already trained as asked")
        return
    images = DistinctImages(folder, PARTS)
    module = CopyDetectionModule(model, shape, seed)
    loss = fit(module, images.loader(batch_size, steps, seed), steps, accelerator)

    def write(partial: Path) -> None:
        weights = {name: value.cpu() for name, value in module.network.state_dict().items()}
        safetensors.torch.save_file(weights, partial / WEIGHTS)
        write_manifest(
            partial,
            "embedding",
            seed,
            shape=shape.to_json(),
            file_sha256=sha256(partial / WEIGHTS),
            parameters=sum(value.numel() for value in weights.values()),
            parts=list(PARTS),
            images=len(images),
            loss=loss,
            identity=identity,
        )

    write_folder(out, write)
    say(
        f"{out}: trained {steps} steps on {len(images)} images, loss {loss:.3g}; next: memfree "
        f"index --dataset {dataset} --features copy_detection --extractor.path {out}"
    )
