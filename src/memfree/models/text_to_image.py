"""Fine-tuning of text-to-image pipelines, with cached latents and embeddings."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from memfree.conditions import TextConditions
from memfree.diffusion_math import per_sample
from memfree.folders.manifest import folder_hash
from memfree.models.export import pipeline_folder
from memfree.models.loading import latent_shape, posterior
from memfree.models.module import DiffusionModule, Normal
from memfree.models.options import ModelOptions
from memfree.models.text_pipeline import TextDenoiser, encode, load_pipeline


class _Cache:
    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self._known)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class LatentCache(_Cache):
    """Mean and standard deviation of each image's latent by image row; on the CPU."""

    def __call__(self, vae: Any, images: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``posterior`` of images (B, 3, H, W), encoding only new rows (B,)."""
        numbers = rows.tolist()
        if min(numbers) < 0:
            raise ValueError(
                "--model.finetune.cache needs a dataset folder: shards without a manifest do not "
                "say which image a record is"
            )
        new = [i for i, row in enumerate(numbers) if row not in self._known]
        if new:
            encoded = zip(*(part.cpu() for part in posterior(vae, images[new])), strict=True)
            self._known.update(zip([numbers[i] for i in new], encoded, strict=True))
        parts = zip(*[self._known[row] for row in numbers], strict=True)
        mean, std = (torch.stack(part).to(images.device) for part in parts)
        return mean, std


class EmbeddingCache(_Cache):
    """Encoded captions by their text, on the device that encodes."""

    def __call__(self, pipe: Any, captions: Sequence[str]) -> TextConditions:
        """``encode`` captions, only new ones."""
        new = [text for text in dict.fromkeys(captions) if text not in self._known]
        if new:
            encoded = encode(pipe, new)
            for i, text in enumerate(new):
                self._known[text] = encoded[slice(i, i + 1)]
        return TextConditions.cat([self._known[text] for text in captions])


class _Shared:
    """Shared by a module and its average: the pipeline, and captions for previews."""

    def __init__(self, pipe: Any, sha256: str | None) -> None:
        self.pipe, self.sha256 = pipe, sha256
        self.captions: list[str] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
"""Layers that get low-rank adapters: all projections of the U-Net's attention."""
ENCODERS = ("text_encoder", "text_encoder_2")
PREVIEW_PIXELS = 1 << 20
"""Pixels of previews drawn at once, so that large ones fit beside a model in training."""


class TextToImageModule(DiffusionModule):
    """Trains the U-Net of a pipeline, or adapters in it, to denoise latents given captions. A batch
    has ``image`` (B, 3, H, W) in [-1, 1], ``caption``, ``row`` (B,) int64, the image's number for
    the cache, and optionally ``weight``. The text encoder is frozen unless
    ``finetune.train_text_encoder``."""

    def __init__(
        self,
        options: ModelOptions,
        pipe: Any = None,
        image_shape: tuple[int, int, int] | None = None,
        seed: int = 0,
        data: dict[str, Any] | None = None,
        stepping: dict[str, Any] | None = None,
    ) -> None:
        """Split a pipeline into trained and frozen parts; see ``DiffusionModule``. ``pipe`` is
        trained in place; None: that of ``options.pretrained``, for ``load_from_checkpoint``."""
        if image_shape is None:
            raise ValueError("image_shape is missing: (3, H, W) of the training images")
        super().__init__(options, image_shape, seed, data, stepping)
        self.keep_arguments(pipe=None)
        options, image_shape = self.options, self.image_shape
        if pipe is None and options.pretrained is None:
            raise ValueError(
                "the options do not name the pipeline that is fine-tuned (pretrained): pass pipe"
            )
        pipe = load_pipeline(str(options.pretrained)) if pipe is None else pipe
        latent_shape(pipe.vae, image_shape)
        choice = options.finetune
        if choice.cache and data is not None and data.get("random_flip"):
            raise ValueError(
                "--model.finetune.cache keeps one latent an image, but --data.random_flip makes "
                "two: leave one of them out"
            )
        if choice.lora_alpha and not choice.lora_rank:
            raise ValueError("--model.finetune.lora_alpha needs --model.finetune.lora_rank")
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        if choice.lora_rank:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                rank = int(choice.lora_rank)
                adapters = LoraConfig(
                    r=rank,
                    lora_alpha=choice.lora_alpha or rank,
                    init_lora_weights="gaussian",
                    target_modules=ATTENTION,
                )
                pipe.unet.add_adapter(adapters)
        else:
            pipe.unet.requires_grad_(True)
        if choice.gradient_checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        self.set_network(pipe.unet, DDPMScheduler.from_config(pipe.scheduler.config))
        encoders = [getattr(pipe, name, None) for name in ENCODERS]
        trained = [part for part in encoders if part is not None and choice.train_text_encoder]
        self.text_encoders = nn.ModuleList(trained).requires_grad_(True)
        self.network.train()
        self.text_encoders.train()
        sha256 = None
        if options.pretrained is not None and Path(options.pretrained).is_dir():  # not on the hub
            sha256 = folder_hash(pipeline_folder(Path(options.pretrained)))
        self._shared = _Shared(pipe, sha256)
        self.denoiser = TextDenoiser(self.network, (image_shape[1], image_shape[2]))
        self.latent_cache = LatentCache() if choice.cache else None
        self.embedding_cache = EmbeddingCache() if choice.cache and not trained else None

    def on_fit_start(self) -> None:
        """Move frozen parts to the device."""
        for name in ("vae", *ENCODERS):
            if getattr(self._shared.pipe, name, None) is not None:
                getattr(self._shared.pipe, name).to(self.device)

    on_validation_start = on_fit_start  # also without a training before

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents."""
        return latent_shape(self._shared.pipe.vae, self.image_shape)

    def clean(self, batch: dict[str, Any], normal: Normal) -> Tensor:
        """Draw scaled latents (B, C, h, w) from the autoencoder's posterior."""
        images, vae = batch["image"], self._shared.pipe.vae
        with torch.autocast(images.device.type, enabled=False):
            if self.latent_cache is None:
                mean, std = posterior(vae, images)
            else:
                mean, std = self.latent_cache(vae, images, batch["row"])
        return mean + std * normal(mean.shape[1:])

    def conditions(self, batch: dict[str, Any], dropped: Tensor | None) -> TextConditions:
        """Encode the captions, the empty one where dropped; ValueError without captions."""
        if "caption" not in batch:
            raise ValueError(
                "fine-tuning text-to-image needs captions, and the data has none: prepare "
                "captioned images"
            )
        captions = list(batch["caption"])
        if dropped is not None:
            self._shared.captions = self._shared.captions or sorted(set(captions))
            pairs = zip(captions, dropped.tolist(), strict=True)
            captions = ["" if drop else caption for caption, drop in pairs]
        if len(self.text_encoders):
            return encode(self._live(), captions)
        cached_or_new = encode if self.embedding_cache is None else self.embedding_cache
        with torch.no_grad():
            return cached_or_new(self._shared.pipe, captions)

    def predict_noise(self, x_t: Tensor, t: Tensor, conditions: TextConditions) -> Tensor:
        """The network's prediction of ε or v."""
        return self.denoiser(x_t, t, conditions)

    def squared_error(
        self, x_0: Tensor, noise: Tensor, t: Tensor, conditions: TextConditions
    ) -> Tensor:
        """Squared errors (B, C, h, w), with min-SNR weights if ``finetune.min_snr_gamma``."""
        error = super().squared_error(x_0, noise, t, conditions)
        if gamma := float(self.options.finetune.min_snr_gamma):
            kind = self.noise_scheduler.config.prediction_type
            weight = min_snr_weight(self.alphas_cumprod[t], gamma, kind)
            error = error * per_sample(weight, error)
        return error

    def facts(self) -> dict[str, Any]:
        """The pipeline's class."""
        return {"pipeline": type(self._shared.pipe).__name__, "num_classes": None}

    def identity(self) -> dict[str, Any]:
        """Add the hash of the local pipeline that is fine-tuned."""
        return {**super().identity(), "pretrained_sha256": self._shared.sha256}

    def _live(self) -> Any:
        pipe = copy.copy(self._shared.pipe)
        pipe.unet = self.network
        for name, encoder in zip(ENCODERS, self.text_encoders, strict=False):
            setattr(pipe, name, encoder)
        return pipe

    def _pipeline(self) -> Any:
        pipe = self._live()
        if self.options.finetune.lora_rank:
            merged: Any = copy.deepcopy(self.network)
            merged.fuse_lora()
            merged.unload_lora()
            pipe.unet = merged
        return pipe

    def save_adapters(self, folder: Path) -> None:
        """Write the adapters alone, for ``pipe.load_lora_weights(folder)``."""
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.network))
        type(self._shared.pipe).save_lora_weights(
            folder, unet_lora_layers=layers, safe_serialization=True
        )

    def sampled(self, x_t: Tensor, scheduler: Any, steps: int) -> Tensor:
        """Draw images with DDIM, cycling through captions of the first batch."""
        pipe = self._live()
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(disable=True)
        captions = self._shared.captions or [""]
        prompts = [captions[i % len(captions)] for i in range(len(x_t))]
        height, width = self.image_shape[1:]
        together = max(1, PREVIEW_PIXELS // (height * width))
        images = [
            pipe(
                prompts[first : first + together],
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=3.0,
                latents=x_t[first : first + together],
                output_type="pt",
            ).images.cpu()
            for first in range(0, len(x_t), together)
        ]
        return torch.cat(images) * 2 - 1


def min_snr_weight(alpha_bar: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR-γ loss weights (B,) (Hang et al., ICCV 2023, arXiv 2303.09556, section 3.4). min(SNR,
    γ)/SNR for ε, min(SNR, γ)/(SNR + 1) for v, with SNR = ᾱ/(1 − ᾱ)."""
    snr = alpha_bar / (1 - alpha_bar)
    capped = snr.clamp(max=gamma)
    return capped / (snr + 1) if prediction_type == "v_prediction" else capped / snr
