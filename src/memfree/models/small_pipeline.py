"""A small Stable Diffusion from nothing: tokenizer, text encoder, U-Net and autoencoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from memfree.models.options import ScratchOptions

START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: Sequence[str], options: ScratchOptions) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair vocabulary is learnt from captions.

    Every byte is a token, so that any prompt can be written.

    Raises:
        ValueError: there are no captions.
    """
    if not any(captions):
        raise ValueError("a tokenizer needs captions: prepare captioned images")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_and_ends = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    # CLIP's own normaliser and word splitter, then byte pairs of what they leave.
    bare = CLIPTokenizer(vocab={token: i for i, token in enumerate([*bytes_and_ends, START, END])})
    learner = bare.backend_tokenizer
    learner.model = models.BPE(end_of_word_suffix="</w>", unk_token=END)
    trainer = trainers.BpeTrainer(
        vocab_size=max(options.vocabulary, len(bytes_and_ends)) - 2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges: Any = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    vocabulary = dict.fromkeys([*bytes_and_ends, *("".join(pair) for pair in merges), START, END])
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=merges,
        model_max_length=options.tokens,
    )


def build_text_encoder(tokenizer: CLIPTokenizer, options: ScratchOptions) -> CLIPTextModel:
    """A CLIP text encoder with fresh weights from torch's global generator."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=options.text_width,
            intermediate_size=4 * options.text_width,
            projection_dim=options.text_width,
            num_hidden_layers=options.text_layers,
            num_attention_heads=max(1, options.text_width // options.head_dim),
            max_position_embeddings=options.tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(vae: Any, options: ScratchOptions) -> Any:
    """A conditional U-Net for the autoencoder's latents, with fresh weights."""
    levels = len(options.block_out_channels)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    heads = [max(1, channels // options.head_dim) for channels in options.block_out_channels]
    return UNet2DConditionModel(
        sample_size=vae.config.sample_size // factor,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=tuple(options.block_out_channels),
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        layers_per_block=options.layers_per_block,
        norm_num_groups=options.norm_num_groups,
        attention_head_dim=tuple(heads),  # diffusers takes the number of heads under this name
        cross_attention_dim=options.text_width,
    )


def build_pipeline(
    vae: Any, captions: Sequence[str], options: ScratchOptions, seed: int
) -> StableDiffusionPipeline:
    """A whole pipeline around a trained autoencoder; its other weights are drawn from ``seed``.

    Args:
        vae: the AutoencoderKL.
        captions: what the tokenizer learns its vocabulary from.
        options: sizes.
        seed: of the weights.
    """
    tokenizer = train_tokenizer(captions, options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = build_text_encoder(tokenizer, options)
        unet = build_unet(vae, options)
    # The noise schedule of Stable Diffusion.
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
