"""Text-to-image pipelines: loading, encoding prompts, calling the denoiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

from memfree.conditions import Conditions, TextConditions
from memfree.folders.untrusted import short
from memfree.folders.untrusted_models import check_parts, check_pipeline_folder
from memfree.models.export import pipeline_folder, quiet_bars

PIPELINES: Any = (StableDiffusionPipeline, StableDiffusionXLPipeline)
XL: Any = StableDiffusionXLPipeline


def load_pipeline(name: str | Path) -> Any:
    """Load an SD 1.x, 2.x or SDXL pipeline from a folder or the hub, in float32 on the CPU."""
    source = pipeline_folder(Path(name))
    local = source.is_dir()
    if local and not (source / "model_index.json").is_file():
        only = "; it holds adapters alone" if any(source.glob("*lora*.safetensors")) else ""
        raise ValueError(
            f"{name} is not a diffusers pipeline: it has no model_index.json{only}: name the "
            "folder of a whole pipeline"
        )
    if local:
        _check_parts(source, str(name))
    try:
        with quiet_bars():
            if not local:  # download to the hub's cache, and check before anything is built
                check_parts(dict(DiffusionPipeline.load_config(str(name))), str(name))
                downloaded = DiffusionPipeline.download(str(name), use_safetensors=True)
                check_pipeline_folder(Path(downloaded))
            # Safetensors only: a pickle from a stranger could execute code.
            pipe: Any = DiffusionPipeline.from_pretrained(
                str(source) if local else str(name), use_safetensors=True, local_files_only=True
            )
    except Exception as error:  # whatever the libraries raise for third-party files
        raise ValueError(
            f"{name} cannot be loaded as a diffusers pipeline: {short(error)}"
        ) from error
    check_pipeline(pipe, str(name))
    return pipe


def _check_parts(folder: Path, name: str) -> None:
    try:
        parts = check_pipeline_folder(folder)
    except (ValueError, OSError) as error:
        raise ValueError(f"{name} cannot be loaded as a diffusers pipeline: {error}") from error
    for kind in PIPELINES:
        if parts.get("_class_name") == kind.__name__:
            _refuse_missing(kind, lambda part: parts.get(part) in (None, [None, None]), name)


def _refuse_missing(kind: Any, is_missing: Callable[[str], bool], name: str) -> None:
    needed = ["unet", "vae", "text_encoder", "tokenizer", "scheduler"]
    if issubclass(kind, XL):
        needed += ["text_encoder_2", "tokenizer_2"]
    for part in needed:
        if is_missing(part):
            raise ValueError(f"{name} has no {part}: give a whole text-to-image pipeline")


def check_pipeline(pipe: Any, name: str) -> None:
    """Refuse anything but a whole Stable Diffusion (XL) text-to-image pipeline."""
    if not isinstance(pipe, PIPELINES):
        raise ValueError(
            f"{name} is a {type(pipe).__name__}: only StableDiffusionPipeline and "
            "StableDiffusionXLPipeline are trained and sampled here; memfree.guard takes more"
        )
    _refuse_missing(type(pipe), lambda part: getattr(pipe, part, None) is None, name)
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise ValueError(
            f"{name}: its U-Net takes {pipe.unet.config.in_channels} channels, its autoencoder "
            f"makes {pipe.vae.config.latent_channels}; inpainting models are not for text-to-image"
        )


def encode(pipe: Any, prompts: Sequence[str]) -> TextConditions:
    """Encode prompts, with gradients where enabled; SDXL may encode the empty prompt as zeros."""
    device = pipe.text_encoder.device
    if isinstance(pipe, XL):
        embeddings, _, pooled, _ = pipe.encode_prompt(
            list(prompts), device=device, do_classifier_free_guidance=False
        )
        if pipe.config.force_zeros_for_empty_prompt:
            kept = [[float(prompt != "")] for prompt in prompts]
            mask = torch.tensor(kept, device=device, dtype=embeddings.dtype)  # (B, 1)
            return TextConditions(embeddings * mask[:, None], pooled * mask)
        return TextConditions(embeddings, pooled)
    embeddings, _ = pipe.encode_prompt(
        list(prompts), device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return TextConditions(embeddings)


class TextDenoiser(nn.Module):
    """A conditional U-Net called like ``Denoiser``. SDXL's network is told ``image_size`` (H, W);
    ``null``, the encoded empty prompt as a batch of 1, is used without conditions."""

    def __init__(
        self, network: Any, image_size: tuple[int, int], null: TextConditions | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.image_size = image_size
        self.null = null

    def forward(self, x_t: Tensor, t: Tensor | int, conditions: Conditions | None = None) -> Tensor:
        """Predict what the scheduler's ``config.prediction_type`` says; see ``Denoiser``."""
        if conditions is None:
            conditions = self.unconditional(len(x_t), x_t.device)
        assert isinstance(conditions, TextConditions)
        added = None
        if conditions.pooled is not None:
            height, width = self.image_size
            # Original size, top left corner of the crop, target size (SDXL, section 2.2).
            times = torch.tensor([height, width, 0, 0, height, width], device=x_t.device)
            added = {
                "text_embeds": conditions.pooled,
                "time_ids": times.to(x_t.dtype).expand(len(x_t), 6),
            }
        return self.network(
            x_t,
            t,
            encoder_hidden_states=conditions.embeddings,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def unconditional(self, count: int, device: torch.device) -> TextConditions | None:
        """The encoded empty prompt, (count, ...), or None."""
        return None if self.null is None else self.null.to(device).expand(count)
