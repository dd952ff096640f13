"""``memfree scratch``: train a small, complete Stable Diffusion from captioned images."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt

from memfree.console import quiet, say
from memfree.data import DatasetFolder
from memfree.folders.atomic import write_atomic
from memfree.folders.untrusted import short
from memfree.models.options import AutoencoderOptions, ScratchOptions

TYPE_CHECKING = False  # not typing's, whose imports jsonargparse would run for --help
if TYPE_CHECKING:
    from torch import Tensor

ADVICE = (".*does not have many workers.*", "Checkpoint directory .* exists and is not empty.*")
SHOWN = 16
"""Test images in the picture of reconstructions."""


def scratch(
    dataset: Path,
    out: Path,
    model: ScratchOptions = ScratchOptions(),  # noqa: B008 - read only; --help shows it
    autoencoder: AutoencoderOptions = AutoencoderOptions(),  # noqa: B008
    accelerator: str = "auto",
    seed: NonNegativeInt = 0,
    overwrite: bool = False,
) -> None:
    """Build a small Stable Diffusion from scratch, for work without pretrained weights.

    Trains an autoencoder on the train and fit images and a tokenizer on the training captions; text
    encoder and U-Net get fresh weights. Writes an ordinary diffusers folder, for train.py
    --model.pretrained with --model.finetune.train_text_encoder true. The same command resumes.

    Args:
        dataset: captioned dataset folder that `memfree prepare` wrote, of RGB images.
        out: model folder to write: diffusers/, manifest.json and reconstructions.png, test images
            above their reconstructions.
        model: sizes of text encoder and U-Net.
        autoencoder: shape and training of the autoencoder.
        accelerator: kind of device: auto, cpu, gpu, mps, ...
        seed: of all weights and draws.
        overwrite: delete a model of another data set or configuration in out.
    """
    import torch

    from memfree.models.export import export_model
    from memfree.models.loading import latent_shape
    from memfree.offline.stable_diffusion import AutoencoderModule, build_pipeline
    from memfree.out_of_memory import ran_out
    from memfree.training.callbacks import FiniteTraining, StepProgress
    from memfree.training.checkpoints import AtomicCheckpointIO, Checkpoints
    from memfree.training.claim import CHECKPOINTS, RECONSTRUCTIONS, begin, claim
    from memfree.training.trainer import build_trainer

    data = DatasetFolder(dataset)
    training, held_out = data.part("train"), data.part("test")
    if training.captions is None:
        raise ValueError(f"--dataset {dataset} has no captions: a text-to-image model needs them")
    captions = _captions(data)
    if not captions:
        raise ValueError(f"--dataset {dataset}: all captions of its training images are empty")
    images = torch.cat([training.images(), data.part("fit").images()])
    # The one training's checkpoint must agree on the whole build.
    build = {"dataset_hash": data.hash, "model": asdict(model)}
    module = AutoencoderModule(autoencoder, images, seed, build)
    latents = latent_shape(module.network, data.image_shape)
    identity = module.identity()
    steps = int(autoencoder.steps)
    claimed = claim(out, identity, int(autoencoder.batch_size), steps, -1, overwrite)
    if claimed.found == "finished":
        say(f"{out} is already built as asked")
        return
    try:
        build_pipeline(module.network, captions, model, seed)
    except Exception as error:  # of diffusers or transformers, for sizes that do not fit
        if ran_out(error):
            raise
        raise ValueError(f"--model.* makes no text-to-image model: {short(error)}") from error
    with quiet(*ADVICE):
        fit = build_trainer(
            accelerator=accelerator,
            devices=1,
            max_steps=steps,
            gradient_clip_val=1.0,
            logger=False,
            callbacks=[Checkpoints(out / CHECKPOINTS, 500), FiniteTraining(), StepProgress()],
            plugins=[AtomicCheckpointIO()],
            default_root_dir=out,
            enable_model_summary=False,
        )
        begin(out, claimed)
        fit.fit(module, ckpt_path=claimed.checkpoint, weights_only=True)
    vae = module.cpu().finish()
    errors = {
        "train": _error(vae, training.images()),
        "test": _error(vae, held_out.images(), out / RECONSTRUCTIONS),
    }
    pipeline: Any = build_pipeline(vae, captions, model, seed)
    export_model(
        out,
        pipeline,
        seed,
        image_shape=list(data.image_shape),
        num_classes=None,
        pipeline="StableDiffusionPipeline",
        dataset=str(dataset),
        dataset_hash=data.hash,
        batch_size=int(autoencoder.batch_size),
        steps=steps,
        epochs=0,
        identity=identity,
        reconstruction_rms=errors,
        tokens=len(pipeline.tokenizer),
    )
    say(
        f"{out}: latents {'x'.join(map(str, latents))}, {len(pipeline.tokenizer)} tokens; "
        f"reconstructions are off by {errors['train']:.3f} (train) and {errors['test']:.3f} "
        "(test), root mean square of values in [-1, 1]"
    )


def _captions(data: DatasetFolder) -> list[str]:
    """Distinct captions of the training records in a fixed order."""
    captions = data.part("train").conditions["caption"].to_pylist()
    return sorted({caption for caption in captions if caption})


def _error(vae: Any, images: Tensor, picture: Path | None = None) -> float:
    """Root mean square error of reconstructions of images (N, 3, H, W); draws the first ones."""
    import torch
    from torchvision.utils import make_grid, save_image

    with torch.no_grad():
        made = torch.cat(
            [vae.decode(vae.encode(part).latent_dist.mode()).sample for part in images.split(64)]
        ).clamp(-1, 1)
    if picture is not None:
        # Not to_bytes: save_image takes [0, 1], and rounds halves up.
        grid = make_grid(torch.cat([images[:SHOWN], made[:SHOWN]]) / 2 + 0.5, nrow=SHOWN)
        write_atomic(picture, lambda path: save_image(grid, path, format="png"))
    return float((made - images).square().mean().sqrt())
