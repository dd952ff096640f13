"""Pipeline families: argument names, conditions, text encoding and prediction for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memfree.conditions import TextConditions

Arguments = dict[str, Any]  # of a denoiser's ``forward``, by name


@dataclass(frozen=True)
class Family:
    """Stable Diffusion 1 and 2, and what all families share."""

    from_image: bool = False  # sampling starts from a noised image
    inpaints: bool = False  # part of that image is kept
    control: str = ""  # the call's argument with the images of a ControlNet
    control_by_prompt: bool = False  # nested lists are one per prompt, not one per network
    denoiser: str = "unet"  # the pipeline's attribute
    model: str = "UNet2DConditionModel"  # its class in diffusers
    sample: str = "sample"  # its argument x_t
    pooled: str = ""  # its argument with the pooled text vector
    mask: str = ""  # its argument that says which token vectors count
    flow: bool = False  # trained by flow matching: x_t = (1−σ)·x_0 + σ·ε, v = ε − x_0
    text_parts: tuple[str, ...] = ("text_encoder", "tokenizer")  # captions need all of them

    def prediction(self, output: Tensor, channels: int) -> Tensor:
        """The channels of the denoiser's output that the scheduler uses (a view)."""
        return output

    def conditions(self, arguments: Arguments) -> TextConditions:
        """The denoiser's text conditions, all rows of the batch."""
        pooled, mask = (arguments[name] if name else None for name in (self.pooled, self.mask))
        return TextConditions(arguments["encoder_hidden_states"], pooled, mask)

    def told(self, arguments: Arguments, conditions: TextConditions) -> Arguments:
        """The arguments with other text conditions."""
        told = {**arguments, "encoder_hidden_states": conditions.embeddings}
        told |= {self.pooled: conditions.pooled} if self.pooled else {}
        told |= {self.mask: conditions.mask} if self.mask else {}
        return told

    def encode(
        self, pipe: Any, captions: Sequence[str], call: Mapping[str, Any], length: int
    ) -> TextConditions:
        """Encode captions as the pipeline would with the call's options, as ``length`` vectors.

        CLIP encodes fixed chunks; up to ``length``, captions are padded with chunks of empty text.
        """
        encoded = self._encode(pipe, list(captions), call)
        if (chunk := encoded.embeddings.shape[1]) < length:
            empty = self._encode(pipe, [""], call).embeddings.expand_as(encoded.embeddings)
            chunks = [encoded.embeddings, *[empty] * ((length - 1) // chunk)]
            encoded = replace(encoded, embeddings=torch.cat(chunks, dim=1))
        return replace(encoded, embeddings=encoded.embeddings[:, :length])

    def missing_text_part(self, pipe: Any) -> str | None:
        """A component that the pipeline lacks for encoding captions, or None."""
        missing = (part for part in self.text_parts if getattr(pipe, part, None) is None)
        return next(missing, None)

    def _encode(self, pipe: Any, captions: list[str], call: Mapping[str, Any]) -> TextConditions:
        return TextConditions(_own_encoding(pipe, captions, **_text_options(call))[0])


def _own_encoding(pipe: Any, captions: list[str], **options: Any) -> Any:
    return pipe.encode_prompt(
        captions,
        device=pipe._execution_device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        **options,
    )


def _text_options(call: Mapping[str, Any]) -> dict[str, Any]:
    adapters = call.get("cross_attention_kwargs") or call.get("joint_attention_kwargs") or {}
    return {"clip_skip": call.get("clip_skip"), "lora_scale": adapters.get("scale")}


@dataclass(frozen=True)
class StableDiffusionXL(Family):
    """Two text encoders: token vectors from both, a pooled vector from the second."""

    text_parts: tuple[str, ...] = ("text_encoder_2", "tokenizer_2")

    def missing_text_part(self, pipe: Any) -> str | None:
        """Requires the first encoder too if the denoiser takes both encoders' vectors."""
        missing = super().missing_text_part(pipe)
        if missing is None and pipe.text_encoder is None:
            second = pipe.text_encoder_2.config.hidden_size
            missing = None if pipe.unet.config.cross_attention_dim == second else "text_encoder"
        return missing

    def conditions(self, arguments: Arguments) -> TextConditions:
        """Token vectors and the pooled vector."""
        pooled = arguments["added_cond_kwargs"]["text_embeds"]
        return replace(super().conditions(arguments), pooled=pooled)

    def told(self, arguments: Arguments, conditions: TextConditions) -> Arguments:
        """Replaces the text; time ids and image embeddings stay."""
        added = {**arguments["added_cond_kwargs"], "text_embeds": conditions.pooled}
        return {**super().told(arguments, conditions), "added_cond_kwargs": added}

    def _encode(self, pipe: Any, captions: list[str], call: Mapping[str, Any]) -> TextConditions:
        embeddings, _, pooled, _ = _own_encoding(pipe, captions, **_text_options(call))
        return TextConditions(embeddings, pooled)


@dataclass(frozen=True)
class PixArt(Family):
    """T5 with a mask; ε is in the first C of 2C channels, the others are an unused variance."""

    denoiser: str = "transformer"
    model: str = "PixArtTransformer2DModel"
    sample: str = "hidden_states"
    mask: str = "encoder_attention_mask"

    def prediction(self, output: Tensor, channels: int) -> Tensor:
        """ε: the first C channels."""
        return output[:, :channels]

    def encode(
        self, pipe: Any, captions: Sequence[str], call: Mapping[str, Any], length: int
    ) -> TextConditions:
        """Uses the call's caption cleaning; T5 pads to ``length`` and masks the padding."""
        options = {name: call[name] for name in ("clean_caption",) if name in call}
        options["max_sequence_length"] = length
        embeddings, mask, _, _ = _own_encoding(pipe, list(captions), **options)
        return TextConditions(embeddings, mask=mask)


@dataclass(frozen=True)
class StableDiffusion3(Family):
    """Two CLIP encoders and T5; a transformer trained by flow matching."""

    denoiser: str = "transformer"
    model: str = "SD3Transformer2DModel"
    sample: str = "hidden_states"
    pooled: str = "pooled_projections"
    flow: bool = True
    text_parts: tuple[str, ...] = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    def encode(
        self, pipe: Any, captions: Sequence[str], call: Mapping[str, Any], length: int
    ) -> TextConditions:
        """All encoders get the caption; T5 fills the length that CLIP leaves."""
        texts = list(captions)
        options = {"prompt_2": texts, "prompt_3": texts, **_text_options(call)}
        options["max_sequence_length"] = max(1, length - pipe.tokenizer_max_length)
        embeddings, _, pooled, _ = _own_encoding(pipe, texts, **options)
        return TextConditions(embeddings[:, :length], pooled)


_STARTS = ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint")
SUPPORTED: dict[type[Family], list[str]] = {
    StableDiffusionXL: [f"StableDiffusionXL{start}Pipeline" for start in _STARTS],
    PixArt: ["PixArtAlphaPipeline", "PixArtSigmaPipeline"],
    StableDiffusion3: ["StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"],
    Family: [
        *(f"StableDiffusion{start}Pipeline" for start in _STARTS),
        *(f"LatentConsistencyModel{start}Pipeline" for start in ("", "Img2Img")),
    ],
}
"""Supported diffusers pipelines by family, subclasses included; names say what they start from."""

_FURTHER_NETWORK = "the guard is not tested with the further network that feeds its denoiser"
REFUSED = {
    "Flux": "with true classifier-free guidance it calls its transformer once a branch, and the "
    "guard has to see both branches in one batch",
    "PAG": "perturbed-attention guidance adds a third branch to the batch",
    "Pix2Pix": "it guides by an image and by a text, which adds a third branch to the batch",
    "Adapter": _FURTHER_NETWORK,
    "Union": _FURTHER_NETWORK,
    "": "it supports Stable Diffusion 1, 2 and XL with their img2img, inpainting and ControlNet "
    "pipelines, latent consistency models, PixArt, and Stable Diffusion 3 with its img2img "
    "pipeline",
}
"""Why the guard refuses a pipeline, by part of its name."""


def family_of(pipe: Any) -> Family:
    """The family of a pipeline; ValueError says why the guard does not support it."""
    import diffusers  # takes seconds, which `import memfree` should not

    for family, names in SUPPORTED.items():
        for name in names:
            if isinstance(pipe, getattr(diffusers, name)):
                inpaints = "Inpaint" in name
                from_image = inpaints or "Img2Img" in name
                control = "control_image" if from_image else "image"
                own = family(
                    from_image,
                    inpaints,
                    control if "ControlNet" in name else "",
                    control_by_prompt=name == "StableDiffusionControlNetPipeline",
                )
                check_parts(pipe, own)
                return own
    name = type(pipe).__name__
    why = next(why for part, why in REFUSED.items() if part in name)
    raise ValueError(f"memfree.guard does not support {name}: {why}")


def check_parts(pipe: Any, family: Family) -> None:
    """Refuse an unsupported denoiser or autoencoder; either may have been replaced."""
    taken = getattr(pipe, family.denoiser).config.in_channels
    latents = pipe.vae.config.latent_channels
    if taken != latents and not (family.inpaints and taken == 2 * latents + 1):
        raise ValueError(
            f"memfree.guard does not support a denoiser of {type(pipe).__name__} that takes "
            f"{taken} channels where latents have {latents}: it sees an image beside x_t"
        )
    if getattr(pipe.vae.config, "latents_mean", None) is not None:
        raise ValueError(
            "memfree.guard does not support autoencoders whose latents are centred "
            "(vae.config.latents_mean)"
        )
