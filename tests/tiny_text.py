"""A tiny Stable Diffusion (XL) around a tiny autoencoder, from nothing."""

import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from tiny_pipelines import autoencoder, unet_xl
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from memfree.models.options import ScratchOptions
from memfree.offline.stable_diffusion import build_pipeline

CAPTIONS = ["red apple", "green apple", "grinning face", "woman firefighter"]
OPTIONS = ScratchOptions(
    vocabulary=600,
    tokens=12,
    text_width=16,
    text_layers=1,
    block_out_channels=[8, 16],
    norm_num_groups=4,
    head_dim=8,
)


def tiny_vae(seed=0):
    return autoencoder(seed, block_out_channels=(4, 8), sample_size=8, scaling_factor=0.7)


def tiny_pipeline(seed=0, prediction_type="epsilon"):
    """Images (3, 8, 8), latents (4, 4, 4)."""
    pipe = build_pipeline(tiny_vae(seed), CAPTIONS, OPTIONS, seed)
    pipe.scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", prediction_type=prediction_type, clip_sample=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_xl(seed=0):
    """The same with the two text encoders of SDXL."""
    pipe = tiny_pipeline(seed)
    torch.manual_seed(seed)
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(**{**pipe.text_encoder.config.to_dict(), "projection_dim": 16})
    ).eval()
    return StableDiffusionXLPipeline(
        vae=pipe.vae,
        text_encoder=pipe.text_encoder,
        text_encoder_2=second,
        tokenizer=pipe.tokenizer,
        tokenizer_2=pipe.tokenizer,
        unet=unet_xl(OPTIONS.text_width, sample_size=4, attention_head_dim=(1, 2)),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    )
