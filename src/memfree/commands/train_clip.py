"""``memfree train-clip``: train a small CLIP on a dataset's captions."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt

from memfree.console import plain_console, say
from memfree.data import DatasetFolder
from memfree.data.split import PartName
from memfree.folders.atomic import write_json
from memfree.folders.claim import claim
from memfree.folders.manifest import sha256, write_manifest
from memfree.models.options import Accelerator, SmallClipOptions

PARTS: tuple[PartName, ...] = ("train", "calibration", "fit")
"""Never test, whose pairs validate the score."""
WEIGHTS = "open_clip_model.safetensors"


def train_clip(
    dataset: Path,
    out: Path,
    model: SmallClipOptions = SmallClipOptions(),  # noqa: B008 - read only; --help shows it
    steps: PositiveInt = 600,
    batch_size: PositiveInt = 128,
    seed: NonNegativeInt = 0,
    accelerator: Accelerator = "auto",
    overwrite: bool = False,
) -> None:
    """Train a small CLIP on the captioned images of a dataset folder.

    For data without a published CLIP: open_clip's own model class with a frozen EfficientNet-Lite0
    (ImageNet) as image trunk. Trains on train, calibration and fit pairs; the test pairs show
    whether its score tells true captions from others. `open_clip.create_model("local-dir:OUT")`
    loads the folder. Takes minutes.

    Args:
        dataset: folder that `memfree prepare` wrote, with captions.
        out: folder to write.
        model: the model and how it is trained.
        steps: optimizer steps.
        batch_size: pairs of a step.
        seed: of weights, order and augmentation.
        accelerator: device to train on.
        overwrite: replace another CLIP in out.
    """
    import safetensors.torch

    from memfree.evaluation.agreement import ClipScorer, deranged, pair_report
    from memfree.offline.short_training import DistinctImages, fit, write_folder
    from memfree.offline.small_clip import PREPROCESSING, SmallClipModule, model_config

    folder = DatasetFolder(dataset)
    identity = {
        "dataset_hash": folder.hash,
        "model": json.loads(json.dumps(asdict(model))),
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
    }
    if claim(out, "clip", identity, overwrite) == "finished":
        say(f"{out} is already trained as asked")
        return
    pairs, test = DistinctImages(folder, PARTS), folder.part("test")
    if pairs.captions is None:
        raise ValueError(f"--dataset {dataset} has no captions; a CLIP needs them")
    captions = test.captions
    if captions is None:
        raise ValueError(f"--dataset {dataset} has test images without captions; prepare it again")
    try:
        deranged(captions, seed)
    except ValueError as error:
        raise ValueError(
            f"--dataset {dataset}: the CLIP cannot be judged, {error} of its test images"
        ) from error
    loader = pairs.loader(batch_size, steps, seed)
    module = SmallClipModule(model, seed)
    with plain_console(stderr=True).status("Looking at the images …"):
        module.look_at(pairs.images())
    loss = fit(module, loader, steps, accelerator)

    def write(partial: Path) -> None:
        network = module.model.cpu().eval()
        weights = {name: value.contiguous() for name, value in network.state_dict().items()}
        safetensors.torch.save_file(weights, partial / WEIGHTS)
        write_json(
            partial / "open_clip_config.json",
            {"model_cfg": model_config(model), "preprocess_cfg": PREPROCESSING},
        )
        report = pair_report(ClipScorer(partial), test.images(), captions, seed)
        write_manifest(
            partial,
            "clip",
            seed,
            file_sha256=sha256(partial / WEIGHTS),
            parts=list(PARTS),
            pairs=len(pairs),
            loss=loss,
            test=report,
            identity=identity,
        )
        say(
            f"{out}: trained {steps} steps on {len(pairs)} pairs, loss {loss:.3g}. "
            f"{report['pairs']} unseen test pairs: cosine {report['score']:.3f}, above shuffled "
            f"captions by {report['margin']:.3f} ({report['low']:.3f} to {report['high']:.3f}); "
            f"median rank of the true caption {report['median_rank']:g}"
        )

    write_folder(out, write)
