"""Fine-tuning of text-to-image pipelines, with cached latents and embeddings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from memfree.conditions import TextConditions
from memfree.diffusion_math import per_sample, training_target
from memfree.folders.manifest import folder_hash
from memfree.models.export import pipeline_folder
from memfree.models.loading import latent_shape, posterior
from memfree.models.module import DiffusionModule, weighted_mean
from memfree.models.options import ModelOptions
from memfree.models.text_pipeline import TextDenoiser, encode, load_pipeline


class LatentCache:
    """Mean and standard deviation of each image's latent, by the row of the image; on the CPU."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentCache:
        return self

    def __call__(self, vae: Any, images: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``posterior`` of images (B, 3, H, W), the autoencoder asked for new rows (B,) only.

        Raises:
            ValueError: foreign shards, whose records have no rows.
        """
        numbers = rows.tolist()
        if min(numbers) < 0:
            raise ValueError(
                "--model.finetune.cache needs a dataset folder: shards without a manifest do not "
                "say which image a record is"
            )
        new = [i for i, row in enumerate(numbers) if row not in self._known]
        if new:
            mean, std = (part.cpu() for part in posterior(vae, images[new]))
            for i, one, two in zip(new, mean, std, strict=True):
                self._known[numbers[i]] = one, two
        found = [self._known[row] for row in numbers]
        mean, std = (torch.stack(parts) for parts in zip(*found, strict=True))
        return mean.to(images.device), std.to(images.device)


class EmbeddingCache:
    """Encoded captions by their text, on the device that encodes."""

    def __init__(self) -> None:
        self._known: dict[str, TextConditions] = {}

    def __len__(self) -> int:
        return len(self._known)

    def __deepcopy__(self, memo: dict[int, Any]) -> EmbeddingCache:
        return self

    def __call__(self, pipe: Any, captions: Sequence[str]) -> TextConditions:
        """``encode`` of captions, the text encoder asked for new ones only."""
        new = [text for text in dict.fromkeys(captions) if text not in self._known]
        if new:
            encoded = encode(pipe, new)
            for i, text in enumerate(new):
                self._known[text] = encoded[slice(i, i + 1)]
        return TextConditions.cat([self._known[text] for text in captions])


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
"""The layers that get low-rank adapters: all projections of the U-Net's attention."""
PREVIEW_PIXELS = 1 << 20
"""Pixels of previews drawn together, so that large ones fit beside a model in training."""


class TextToImageModule(DiffusionModule):
    """Trains the U-Net of a pipeline, or adapters in it, to denoise latents given captions.

    A batch is a dict: ``image`` (B, 3, H, W) in [-1, 1]; ``caption``, B strings; ``row`` (B,)
    int64, which image it is, for the cache; optionally ``weight``. The autoencoder is frozen, and
    so is the text encoder unless ``finetune.train_text_encoder``.
    """

    def __init__(
        self,
        options: ModelOptions,
        pipe: Any = None,
        image_shape: tuple[int, int, int] | None = None,
        seed: int = 0,
        data: dict[str, Any] | None = None,
        stepping: dict[str, Any] | None = None,
    ) -> None:
        """Take a pipeline apart into what is trained and what is frozen.

        Args:
            options: optimisation; ``finetune``; a mapping, as checkpoints have it, of the same
                names.
            pipe: StableDiffusionPipeline or StableDiffusionXLPipeline; its networks are trained in
                place. None: that of ``options.pretrained``, as ``load_from_checkpoint`` has it.
            image_shape: (3, H, W) of the training images; always needed.
            seed: of the adapters and of all that training draws.
            data: what the images are; see ``DiffusionModule``.
            stepping: how the Trainer takes a step; see ``DiffusionModule``.

        Raises:
            ValueError: no image_shape, images that do not fit the autoencoder, options that
                contradict each other, or no pipeline.
            OSError: no pipeline has the name ``options.pretrained``.
        """
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
                pipe.unet.add_adapter(_adapters(options))
        else:
            pipe.unet.requires_grad_(True)
        if choice.gradient_checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        self.set_network(pipe.unet, DDPMScheduler.from_config(pipe.scheduler.config))
        encoders = [pipe.text_encoder, getattr(pipe, "text_encoder_2", None)]
        trained = [one for one in encoders if one is not None and choice.train_text_encoder]
        self.text_encoders = nn.ModuleList(trained).requires_grad_(True)
        self.network.train()
        self.text_encoders.train()
        self._shared = _Shared(pipe, _contents(options.pretrained))
        self.denoiser = TextDenoiser(self.network, (image_shape[1], image_shape[2]))
        self.latent_cache = LatentCache() if choice.cache else None
        self.embedding_cache = EmbeddingCache() if choice.cache and not trained else None

    def on_fit_start(self) -> None:
        """Move what is frozen to the device."""
        self._move_frozen()

    def on_validation_start(self) -> None:
        """Move what is frozen to the device, also without a training before."""
        self._move_frozen()

    def _move_frozen(self) -> None:
        self._shared.pipe.vae.to(self.device)
        for name in ("text_encoder", "text_encoder_2"):
            if getattr(self._shared.pipe, name, None) is not None:
                getattr(self._shared.pipe, name).to(self.device)

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Loss of a batch, 0-d: mean over images of weight · mean over the latent of the square.

        Raises:
            ValueError: the data has no captions.
        """
        captions = _captions(batch)
        self._shared.captions = self._shared.captions or sorted(set(captions))
        device = batch["image"].device

        def normal(shape: Sequence[int]) -> Tensor:
            return torch.randn((len(captions), *shape), generator=generator, device=device)

        x_0 = self._latents(batch, normal)
        count = len(x_0)
        noise = normal(x_0.shape[1:])
        t = torch.randint(len(self.alphas_cumprod), (count,), generator=generator, device=device)
        dropped = torch.rand(count, generator=generator, device=device) < self.options.label_dropout
        shown = [
            "" if drop else text for drop, text in zip(dropped.tolist(), captions, strict=True)
        ]
        error = self.squared_error(x_0, noise, t, self._encoded(shown))
        return weighted_mean(error, batch.get("weight", 1.0))

    def clean(
        self, batch: dict[str, Any], noise: Callable[[Sequence[int]], Tensor]
    ) -> tuple[Tensor, TextConditions]:
        """Latents drawn from the autoencoder's posterior, and the encoded captions.

        Raises:
            ValueError: the data has no captions.
        """
        captions = _captions(batch)
        return self._latents(batch, noise), self._encoded(captions)

    def squared_error(
        self, x_0: Tensor, noise: Tensor, t: Tensor, conditions: TextConditions
    ) -> Tensor:
        """Squared errors (B, C, h, w) of the prediction of ε or v; see ``DiffusionModule``."""
        alpha_bar = self.alphas_cumprod[t]  # (B,)
        a = per_sample(alpha_bar, x_0)
        x_t = a.sqrt() * x_0 + (1 - a).sqrt() * noise
        prediction = self.denoiser(x_t, t, conditions)
        kind = self.noise_scheduler.config.prediction_type
        target = training_target(x_0, noise, alpha_bar, kind)
        error = (prediction.float() - target).square()
        if self.options.finetune.min_snr_gamma:
            gamma = float(self.options.finetune.min_snr_gamma)
            error = error * per_sample(min_snr_weight(alpha_bar, gamma, kind), error)
        return error

    def _latents(self, batch: dict[str, Any], noise: Callable[[Sequence[int]], Tensor]) -> Tensor:
        """Scaled latents drawn from the autoencoder's posterior, (B, C, h, w)."""
        images, vae = batch["image"], self._shared.pipe.vae
        with torch.autocast(images.device.type, enabled=False):
            if self.latent_cache is None:
                mean, std = posterior(vae, images)
            else:
                mean, std = self.latent_cache(vae, images, batch["row"])
        return mean + std * noise(mean.shape[1:])

    def _encoded(self, captions: Sequence[str]) -> TextConditions:
        pipe = self._shared.pipe
        if len(self.text_encoders):
            return encode(self._live(), captions)
        with torch.no_grad():
            if self.embedding_cache is None:
                return encode(pipe, captions)
            return self.embedding_cache(pipe, captions)

    def facts(self) -> dict[str, Any]:
        """The class of its pipeline."""
        return {"pipeline": type(self._shared.pipe).__name__, "num_classes": None}

    def identity(self) -> dict[str, Any]:
        """As of every module, and the contents of a local folder that is fine-tuned."""
        return {**super().identity(), "pretrained_sha256": self._shared.sha256}

    def _live(self) -> Any:
        """The pipeline around this module's own networks."""
        pipe = copy.copy(self._shared.pipe)
        pipe.unet = self.network
        for name, encoder in zip(
            ("text_encoder", "text_encoder_2"), self.text_encoders, strict=False
        ):
            setattr(pipe, name, encoder)
        return pipe

    def _pipeline(self) -> Any:
        """The pipeline as it is saved: adapters are merged into a copy of the U-Net."""
        pipe = self._live()
        if self.options.finetune.lora_rank:
            merged: Any = copy.deepcopy(self.network)
            merged.fuse_lora()
            merged.unload_lora()
            pipe.unet = merged
        return pipe

    def save_adapters(self, folder: Path) -> None:
        """Write the adapters alone, as ``pipe.load_lora_weights(folder)`` reads them."""
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.network))
        type(self._shared.pipe).save_lora_weights(
            folder, unet_lora_layers=layers, safe_serialization=True
        )

    @torch.no_grad()
    def preview(self, count: int, steps: int, seed: int) -> Tensor:
        """Samples (count, 3, H, W) of captions of the first batch, in turn."""
        pipe = self._live()
        pipe.scheduler = DDIMScheduler.from_config(
            self.noise_scheduler.config, timestep_spacing="trailing"
        )
        pipe.set_progress_bar_config(disable=True)
        captions = self._shared.captions or [""]
        prompts = [captions[i % len(captions)] for i in range(count)]
        shape = latent_shape(pipe.vae, self.image_shape)
        noise = torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed))
        was_training = self.training
        self.eval()
        height, width = self.image_shape[1:]
        together = max(1, PREVIEW_PIXELS // (height * width))
        images = [
            pipe(
                prompts[first : first + together],
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=3.0,
                latents=noise[first : first + together].to(self.device),
                output_type="pt",
            ).images.cpu()
            for first in range(0, count, together)
        ]
        self.train(was_training)
        return torch.cat(images) * 2 - 1


def _captions(batch: dict[str, Any]) -> list[str]:
    if "caption" not in batch:
        raise ValueError(
            "fine-tuning text-to-image needs captions, and the data has none: prepare "
            "captioned images"
        )
    return list(batch["caption"])


class _Shared:
    """What the module and its average share: the pipeline, whose frozen parts are not copied, and
    captions to draw previews for."""

    def __init__(self, pipe: Any, sha256: str | None) -> None:
        self.pipe = pipe
        self.sha256 = sha256
        self.captions: list[str] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


def _contents(pretrained: str | None) -> str | None:
    """Hash of a local folder's files; None for a name on the hub."""
    if pretrained is None or not Path(pretrained).is_dir():
        return None
    return folder_hash(pipeline_folder(Path(pretrained)))


def _adapters(options: ModelOptions) -> LoraConfig:
    rank = int(options.finetune.lora_rank)
    return LoraConfig(
        r=rank,
        lora_alpha=options.finetune.lora_alpha or rank,
        init_lora_weights="gaussian",
        target_modules=ATTENTION,
    )


def min_snr_weight(alpha_bar: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR-γ weights (B,) of the loss (Hang et al., ICCV 2023, arXiv 2303.09556, section 3.4).

    min(SNR, γ)/SNR for ε, min(SNR, γ)/(SNR + 1) for v, with SNR = ᾱ/(1 − ᾱ).
    """
    snr = alpha_bar / (1 - alpha_bar)
    capped = snr.clamp(max=gamma)
    return capped / (snr + 1) if prediction_type == "v_prediction" else capped / snr
