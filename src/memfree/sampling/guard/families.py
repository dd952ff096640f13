"""What differs by pipeline family: names of arguments, conditions, text encoding, prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from memfree.conditions import TextConditions

Arguments = dict[str, Any]
"""Arguments of a denoiser's ``forward`` by name."""


@dataclass(frozen=True)
class Family:
    """Stable Diffusion 1 and 2, and what all families have in common."""

    denoiser: str = "unet"
    """Name of the pipeline's denoiser."""
    model: str = "UNet2DConditionModel"
    """Class of diffusers that the pipeline's denoiser is."""
    sample: str = "sample"
    """Name of the denoiser's argument x_t."""
    flow: bool = False
    """Whether the model was trained by flow matching: x_t = (1−σ)·x_0 + σ·ε, v = ε − x_0."""
    from_image: bool = False
    """Whether sampling begins with a given image, noised."""

    def prediction(self, output: Tensor, channels: int) -> Tensor:
        """The part of the denoiser's output that the scheduler steps with."""
        return output

    def conditions(self, arguments: Arguments) -> TextConditions:
        """What the denoiser was told of the prompts, all rows of the batch."""
        return TextConditions(arguments["encoder_hidden_states"])

    def told(self, arguments: Arguments, conditions: TextConditions) -> Arguments:
        """The arguments with other conditions in their place."""
        return {**arguments, "encoder_hidden_states": conditions.embeddings}

    def encode(self, pipe: Any, captions: Sequence[str], call: Mapping[str, Any]) -> TextConditions:
        """The pipeline's own text encoding of captions, with the options of the pipeline call."""
        embeddings, _ = pipe.encode_prompt(
            list(captions), pipe._execution_device, 1, False, **self._text_options(call)
        )
        return TextConditions(embeddings)

    def _text_options(self, call: Mapping[str, Any]) -> dict[str, Any]:
        adapters = call.get("cross_attention_kwargs") or call.get("joint_attention_kwargs") or {}
        return {"clip_skip": call.get("clip_skip"), "lora_scale": adapters.get("scale")}


@dataclass(frozen=True)
class StableDiffusionXL(Family):
    """Two text encoders: token vectors of both, and a pooled vector of the second."""

    def conditions(self, arguments: Arguments) -> TextConditions:
        """Token vectors and pooled vector."""
        return TextConditions(
            arguments["encoder_hidden_states"], arguments["added_cond_kwargs"]["text_embeds"]
        )

    def told(self, arguments: Arguments, conditions: TextConditions) -> Arguments:
        """Time ids and image embeddings stay."""
        added = {**arguments["added_cond_kwargs"], "text_embeds": conditions.pooled}
        return {**super().told(arguments, conditions), "added_cond_kwargs": added}

    def encode(self, pipe: Any, captions: Sequence[str], call: Mapping[str, Any]) -> TextConditions:
        """Both encoders are given the caption."""
        embeddings, _, pooled, _ = pipe.encode_prompt(
            prompt=list(captions),
            device=pipe._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            **self._text_options(call),
        )
        return TextConditions(embeddings, pooled)


@dataclass(frozen=True)
class PixArt(Family):
    """T5 with a mask; ε in the first C of 2C channels, the rest is a variance nobody uses."""

    denoiser: str = "transformer"
    model: str = "PixArtTransformer2DModel"
    sample: str = "hidden_states"

    def prediction(self, output: Tensor, channels: int) -> Tensor:
        """ε: the first C channels (a view)."""
        return output[:, :channels]

    def conditions(self, arguments: Arguments) -> TextConditions:
        """Token vectors and which of them count."""
        return TextConditions(
            arguments["encoder_hidden_states"], mask=arguments["encoder_attention_mask"]
        )

    def told(self, arguments: Arguments, conditions: TextConditions) -> Arguments:
        """The mask goes with the vectors."""
        return {
            **super().told(arguments, conditions),
            "encoder_attention_mask": conditions.mask,
        }

    def encode(self, pipe: Any, captions: Sequence[str], call: Mapping[str, Any]) -> TextConditions:
        """With the call's own caption cleaning and length."""
        options = {
            name: call[name] for name in ("clean_caption", "max_sequence_length") if name in call
        }
        embeddings, mask, _, _ = pipe.encode_prompt(
            list(captions),
            do_classifier_free_guidance=False,
            num_images_per_prompt=1,
            device=pipe._execution_device,
            **options,
        )
        return TextConditions(embeddings, mask=mask)


@dataclass(frozen=True)
class StableDiffusion3(Family):
    """Two CLIP encoders and T5; flow matching on a transformer."""

    denoiser: str = "transformer"
    model: str = "SD3Transformer2DModel"
    sample: str = "hidden_states"
    flow: bool = True

    def conditions(self, arguments: Arguments) -> TextConditions:
        """Token vectors and pooled vector."""
        return TextConditions(arguments["encoder_hidden_states"], arguments["pooled_projections"])

    def told(self, arguments: Arguments, conditions: TextConditions) -> Arguments:
        """The pooled vector goes with the tokens."""
        return {**super().told(arguments, conditions), "pooled_projections": conditions.pooled}

    def encode(self, pipe: Any, captions: Sequence[str], call: Mapping[str, Any]) -> TextConditions:
        """All encoders are given the caption."""
        texts = list(captions)
        embeddings, _, pooled, _ = pipe.encode_prompt(
            prompt=texts,
            prompt_2=texts,
            prompt_3=texts,
            device=pipe._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            max_sequence_length=call.get("max_sequence_length", 256),
            **self._text_options(call),
        )
        return TextConditions(embeddings, pooled)


def family_of(pipe: Any) -> Family:
    """What kind of pipeline this is.

    Raises:
        ValueError: it is none that the guard supports; the message says why.
    """
    import diffusers  # takes seconds, which `import memfree` should not

    families: list[tuple[type, Family]] = [
        (diffusers.StableDiffusionPipeline, Family()),
        (diffusers.StableDiffusionImg2ImgPipeline, Family(from_image=True)),
        (diffusers.StableDiffusionXLPipeline, StableDiffusionXL()),
        (diffusers.StableDiffusionXLImg2ImgPipeline, StableDiffusionXL(from_image=True)),
        (diffusers.PixArtAlphaPipeline, PixArt()),
        (diffusers.PixArtSigmaPipeline, PixArt()),
        (diffusers.StableDiffusion3Pipeline, StableDiffusion3()),
    ]
    name = type(pipe).__name__
    family = next((family for kind, family in families if isinstance(pipe, kind)), None)
    if family is None:
        raise ValueError(f"memfree.guard does not support {name}: {_reason(name)}")
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    if all(getattr(pipe, encoder, None) is None for encoder in encoders):
        raise ValueError(
            f"memfree.guard needs the text encoder of {name} (it encodes the captions of near "
            "training images), but this pipeline was loaded without one"
        )
    if all(getattr(pipe, part, None) is None for part in ("tokenizer", "tokenizer_2")):
        raise ValueError(f"memfree.guard needs the tokenizer of {name}, which has none")
    taken = getattr(pipe, family.denoiser).config.in_channels
    latents = pipe.vae.config.latent_channels
    if taken != latents:
        raise ValueError(
            f"memfree.guard does not support a denoiser that takes {taken} channels where latents "
            f"have {latents}: inpainting and edit models see an image beside x_t"
        )
    if getattr(pipe.vae.config, "latents_mean", None) is not None:
        raise ValueError(
            "memfree.guard does not support autoencoders whose latents are centred "
            "(vae.config.latents_mean)"
        )
    return family


def _reason(name: str) -> str:
    if "Flux" in name:
        return (
            "with true classifier-free guidance it calls its transformer once a branch, and the "
            "guard has to see both branches in one batch"
        )
    if "Inpaint" in name:
        return "inpainting mixes the given image into every step, which no guidance may change"
    if "ControlNet" in name or "Adapter" in name:
        return "further networks feed its denoiser, which the guard could not call again by itself"
    return (
        "it supports Stable Diffusion 1, 2 and XL with their img2img pipelines, PixArt, and "
        "Stable Diffusion 3"
    )
