"""Pipeline families: argument names, conditions, text encoding and prediction of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
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
    inpaints: bool = False
    """Whether part of that image is kept."""
    control: str = ""
    """Name of the call's argument with the images of a ControlNet; empty without one."""
    control_by_prompt: bool = False
    """Whether lists of lists of these images hold a list a prompt, rather than a ControlNet."""
    text_parts: tuple[str, ...] = ("text_encoder", "tokenizer")
    """Components without which captions cannot be encoded."""

    def prediction(self, output: Tensor, channels: int) -> Tensor:
        """The part of the denoiser's output that the scheduler steps with."""
        return output

    def conditions(self, arguments: Arguments) -> TextConditions:
        """What the denoiser was told of the prompts, all rows of the batch."""
        return TextConditions(arguments["encoder_hidden_states"])

    def told(self, arguments: Arguments, conditions: TextConditions) -> Arguments:
        """The arguments with other conditions in their place."""
        return {**arguments, "encoder_hidden_states": conditions.embeddings}

    def encode(
        self, pipe: Any, captions: Sequence[str], call: Mapping[str, Any], length: int
    ) -> TextConditions:
        """The pipeline's own text encoding of captions, with the options of the pipeline call.

        Args:
            pipe: the pipeline.
            captions: at least one.
            call: arguments of the pipeline call by name.
            length: token vectors of the call's prompts, L. CLIP encodes a fixed number, a chunk:
                longer prompts are several chunks, and captions are filled up with chunks of the
                empty text, as tools for long prompts do.

        Returns:
            Conditions of as many captions and ``length`` token vectors.
        """
        encoded = self._encode(pipe, list(captions), call)
        if (chunk := encoded.embeddings.shape[1]) < length:
            empty = self._encode(pipe, [""], call).embeddings.expand_as(encoded.embeddings)
            chunks = [encoded.embeddings, *[empty] * ((length - 1) // chunk)]
            encoded = replace(encoded, embeddings=torch.cat(chunks, dim=1))
        return replace(encoded, embeddings=encoded.embeddings[:, :length])

    def missing_text_part(self, pipe: Any) -> str | None:
        """A component without which the pipeline cannot encode captions; None if it has all."""
        missing = (part for part in self.text_parts if getattr(pipe, part, None) is None)
        return next(missing, None)

    def _encode(self, pipe: Any, captions: list[str], call: Mapping[str, Any]) -> TextConditions:
        embeddings, _ = pipe.encode_prompt(
            captions, pipe._execution_device, 1, False, **self._text_options(call)
        )
        return TextConditions(embeddings)

    def _text_options(self, call: Mapping[str, Any]) -> dict[str, Any]:
        adapters = call.get("cross_attention_kwargs") or call.get("joint_attention_kwargs") or {}
        return {"clip_skip": call.get("clip_skip"), "lora_scale": adapters.get("scale")}


@dataclass(frozen=True)
class StableDiffusionXL(Family):
    """Two text encoders: token vectors of both, and a pooled vector of the second."""

    text_parts: tuple[str, ...] = ("text_encoder_2", "tokenizer_2")

    def missing_text_part(self, pipe: Any) -> str | None:
        """The first encoder too, where the denoiser takes the vectors of both."""
        missing = super().missing_text_part(pipe)
        if missing is None and pipe.text_encoder is None:
            second = pipe.text_encoder_2.config.hidden_size
            missing = None if pipe.unet.config.cross_attention_dim == second else "text_encoder"
        return missing

    def conditions(self, arguments: Arguments) -> TextConditions:
        """Token vectors and pooled vector."""
        return TextConditions(
            arguments["encoder_hidden_states"], arguments["added_cond_kwargs"]["text_embeds"]
        )

    def told(self, arguments: Arguments, conditions: TextConditions) -> Arguments:
        """Time ids and image embeddings stay."""
        added = {**arguments["added_cond_kwargs"], "text_embeds": conditions.pooled}
        return {**super().told(arguments, conditions), "added_cond_kwargs": added}

    def _encode(self, pipe: Any, captions: list[str], call: Mapping[str, Any]) -> TextConditions:
        """Both encoders are given the caption."""
        embeddings, _, pooled, _ = pipe.encode_prompt(
            prompt=captions,
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

    def encode(
        self, pipe: Any, captions: Sequence[str], call: Mapping[str, Any], length: int
    ) -> TextConditions:
        """With the call's own caption cleaning; T5 is asked for the length, and masks the rest."""
        options = {name: call[name] for name in ("clean_caption",) if name in call}
        embeddings, mask, _, _ = pipe.encode_prompt(
            list(captions),
            do_classifier_free_guidance=False,
            num_images_per_prompt=1,
            device=pipe._execution_device,
            max_sequence_length=length,
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
    text_parts: tuple[str, ...] = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    def conditions(self, arguments: Arguments) -> TextConditions:
        """Token vectors and pooled vector."""
        return TextConditions(arguments["encoder_hidden_states"], arguments["pooled_projections"])

    def told(self, arguments: Arguments, conditions: TextConditions) -> Arguments:
        """The pooled vector goes with the tokens."""
        return {**super().told(arguments, conditions), "pooled_projections": conditions.pooled}

    def encode(
        self, pipe: Any, captions: Sequence[str], call: Mapping[str, Any], length: int
    ) -> TextConditions:
        """All encoders are given the caption; T5 makes what CLIP leaves of the length."""
        texts = list(captions)
        embeddings, _, pooled, _ = pipe.encode_prompt(
            prompt=texts,
            prompt_2=texts,
            prompt_3=texts,
            device=pipe._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            max_sequence_length=max(1, length - pipe.tokenizer_max_length),
            **self._text_options(call),
        )
        return TextConditions(embeddings[:, :length], pooled)


def family_of(pipe: Any) -> Family:
    """What kind of pipeline this is.

    Raises:
        ValueError: it is none that the guard supports; the message says why.
    """
    import diffusers  # takes seconds, which `import memfree` should not

    families: list[tuple[type, Family]] = [
        (diffusers.StableDiffusionPipeline, Family()),
        (diffusers.StableDiffusionImg2ImgPipeline, Family(from_image=True)),
        (diffusers.StableDiffusionInpaintPipeline, Family(from_image=True, inpaints=True)),
        (
            diffusers.StableDiffusionControlNetPipeline,
            Family(control="image", control_by_prompt=True),
        ),
        (
            diffusers.StableDiffusionControlNetImg2ImgPipeline,
            Family(from_image=True, control="control_image"),
        ),
        (
            diffusers.StableDiffusionControlNetInpaintPipeline,
            Family(from_image=True, inpaints=True, control="control_image"),
        ),
        (diffusers.LatentConsistencyModelPipeline, Family()),
        (diffusers.LatentConsistencyModelImg2ImgPipeline, Family(from_image=True)),
        (diffusers.StableDiffusionXLPipeline, StableDiffusionXL()),
        (diffusers.StableDiffusionXLImg2ImgPipeline, StableDiffusionXL(from_image=True)),
        (
            diffusers.StableDiffusionXLInpaintPipeline,
            StableDiffusionXL(from_image=True, inpaints=True),
        ),
        (diffusers.StableDiffusionXLControlNetPipeline, StableDiffusionXL(control="image")),
        (
            diffusers.StableDiffusionXLControlNetImg2ImgPipeline,
            StableDiffusionXL(from_image=True, control="control_image"),
        ),
        (
            diffusers.StableDiffusionXLControlNetInpaintPipeline,
            StableDiffusionXL(from_image=True, inpaints=True, control="control_image"),
        ),
        (diffusers.PixArtAlphaPipeline, PixArt()),
        (diffusers.PixArtSigmaPipeline, PixArt()),
        (diffusers.StableDiffusion3Pipeline, StableDiffusion3()),
        (diffusers.StableDiffusion3Img2ImgPipeline, StableDiffusion3(from_image=True)),
    ]
    name = type(pipe).__name__
    family = next((family for kind, family in families if isinstance(pipe, kind)), None)
    if family is None:
        raise ValueError(f"memfree.guard does not support {name}: {_reason(name)}")
    check_parts(pipe, family)
    return family


def check_parts(pipe: Any, family: Family) -> None:
    """Refuse a denoiser and an autoencoder that the guard cannot take: they may be replaced.

    Raises:
        ValueError: the message says which and why.
    """
    name = type(pipe).__name__
    taken = getattr(pipe, family.denoiser).config.in_channels
    latents = pipe.vae.config.latent_channels
    if taken != latents and not (family.inpaints and taken == 2 * latents + 1):
        raise ValueError(
            f"memfree.guard does not support a denoiser of {name} that takes {taken} channels "
            f"where latents have {latents}: it sees an image beside x_t"
        )
    if getattr(pipe.vae.config, "latents_mean", None) is not None:
        raise ValueError(
            "memfree.guard does not support autoencoders whose latents are centred "
            "(vae.config.latents_mean)"
        )


def _reason(name: str) -> str:
    if "Flux" in name:
        return (
            "with true classifier-free guidance it calls its transformer once a branch, and the "
            "guard has to see both branches in one batch"
        )
    if "PAG" in name:
        return "perturbed-attention guidance adds a third branch to the batch"
    if "Pix2Pix" in name:
        return "it guides by an image and by a text, which adds a third branch to the batch"
    if "Adapter" in name or "Union" in name:
        return "the guard is not tested with the further network that feeds its denoiser"
    return (
        "it supports Stable Diffusion 1, 2 and XL with their img2img, inpainting and ControlNet "
        "pipelines, latent consistency models, PixArt, and Stable Diffusion 3 with its img2img "
        "pipeline"
    )
