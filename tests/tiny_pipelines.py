"""Tiny random networks, and diffusers pipelines of them: 16×16 pixels, latents of 8×8."""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WIDTH, TOKENS, PIXELS = 32, 16, 16
START, END = "<|startoftext|>", "<|endoftext|>"


def seeded(make, seed=0):
    """What ``make`` builds, from fixed weights and without touching torch's own generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval().requires_grad_(False)


def clip_tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), START, END]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)},
        merges=[],
        model_max_length=TOKENS,
    )


def clip_text_encoder(projection=False):
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return seeded(lambda: kind(config))


def t5_tokenizer():
    letters = [chr(i) for i in range(97, 123)]
    pieces = ["<pad>", "</s>", "<unk>", "▁", *letters, *("▁" + letter for letter in letters)]
    return T5Tokenizer(
        vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)],
        extra_ids=0,
        model_max_length=TOKENS,
    )


def t5_text_encoder():
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=WIDTH,
        d_kv=8,
        d_ff=WIDTH,
        num_layers=1,
        num_heads=2,
        is_encoder_decoder=False,
    )
    return seeded(lambda: T5EncoderModel(config))


def autoencoder(seed=0, **config):
    return seeded(
        lambda: AutoencoderKL(
            **{
                "sample_size": PIXELS,
                "block_out_channels": (8, 8),
                "norm_num_groups": 4,
                "down_block_types": ("DownEncoderBlock2D",) * 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2,
                "latent_channels": 4,
                **config,
            }
        ),
        seed,
    )


def tiny_autoencoder(latent_channels=4):
    """A cheap decoder for the same latents."""
    return seeded(
        lambda: AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=latent_channels,
        )
    )


def unet(in_channels=4, seed=0, **config):
    return seeded(
        lambda: UNet2DConditionModel(
            **{
                "sample_size": PIXELS // 2,
                "in_channels": in_channels,
                "out_channels": 4,
                "layers_per_block": 1,
                "block_out_channels": (8, 16),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "cross_attention_dim": WIDTH,
                "attention_head_dim": 4,
                "norm_num_groups": 4,
                **config,
            }
        ),
        seed,
    )


def unet_xl(width=WIDTH, **config):
    """With Stable Diffusion XL's further conditions, of text encoders of this width."""
    return unet(
        **{
            "cross_attention_dim": 2 * width,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + width,
            **config,
        }
    )


def noise_schedule(kind=DDIMScheduler, **config):
    """A scheduler of Stable Diffusion's noise levels."""
    levels = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }
    if kind is DDIMScheduler:
        levels |= {"clip_sample": False, "set_alpha_to_one": False}
    return kind(**{**levels, **config})


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion(scheduler=None, kind=StableDiffusionPipeline, **parts):
    """Stable Diffusion 1: one CLIP text encoder, ε prediction."""
    components = {
        "vae": autoencoder(),
        "text_encoder": clip_text_encoder(),
        "tokenizer": clip_tokenizer(),
        "unet": unet(),
        "scheduler": scheduler or noise_schedule(),
        "safety_checker": None,
        "feature_extractor": None,
    }
    return _quiet(kind(**{**components, **parts}, requires_safety_checker=False))


def stable_diffusion_img2img(scheduler=None, **parts):
    return stable_diffusion(scheduler, StableDiffusionImg2ImgPipeline, **parts)


def stable_diffusion_xl(scheduler=None, kind=StableDiffusionXLPipeline, **parts):
    """Stable Diffusion XL: two CLIP text encoders, pooled embeddings, time ids."""
    components = {
        "vae": autoencoder(),
        "text_encoder": clip_text_encoder(),
        "text_encoder_2": clip_text_encoder(projection=True),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "unet": unet_xl(),
        "scheduler": scheduler or noise_schedule(EulerDiscreteScheduler),
    }
    return _quiet(kind(**{**components, **parts}, add_watermarker=False))


def stable_diffusion_xl_img2img(scheduler=None, **parts):
    return stable_diffusion_xl(scheduler, StableDiffusionXLImg2ImgPipeline, **parts)


def pixart(scheduler=None, kind=PixArtAlphaPipeline, **parts):
    """PixArt: a T5 encoder with masks, a transformer of 2C output channels."""
    transformer = seeded(
        lambda: PixArtTransformer2DModel(
            sample_size=PIXELS // 2,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=WIDTH,
            in_channels=4,
            cross_attention_dim=16,
            out_channels=8,
            norm_type="ada_norm_single",
            use_additional_conditions=False,
        )
    )
    # Its last layer starts at zero in some versions: give it weights, so that it predicts.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    components = {
        "vae": autoencoder(),
        "text_encoder": t5_text_encoder(),
        "tokenizer": t5_tokenizer(),
        "transformer": transformer,
        "scheduler": scheduler or noise_schedule(),
    }
    return _quiet(kind(**{**components, **parts}))


def pixart_sigma(scheduler=None, **parts):
    return pixart(scheduler, PixArtSigmaPipeline, **parts)


def stable_diffusion_3(scheduler=None, kind=StableDiffusion3Pipeline, **parts):
    """Stable Diffusion 3: two CLIP encoders and T5, flow matching on a transformer."""
    transformer = seeded(
        lambda: SD3Transformer2DModel(
            sample_size=PIXELS // 2,
            patch_size=1,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=2 * WIDTH,
            out_channels=4,
        )
    )
    components = {
        "vae": autoencoder(scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False),
        "text_encoder": clip_text_encoder(projection=True),
        "text_encoder_2": clip_text_encoder(projection=True),
        "text_encoder_3": seeded(
            lambda: T5EncoderModel(
                T5Config(
                    vocab_size=len(t5_tokenizer()),
                    d_model=2 * WIDTH,
                    d_kv=8,
                    d_ff=WIDTH,
                    num_layers=1,
                    num_heads=2,
                    is_encoder_decoder=False,
                )
            )
        ),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "tokenizer_3": t5_tokenizer(),
        "transformer": transformer,
        "scheduler": scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    return _quiet(kind(**{**components, **parts}))


def stable_diffusion_inpaint(scheduler=None, **parts):
    return stable_diffusion(scheduler, StableDiffusionInpaintPipeline, **parts)


def stable_diffusion_inpaint_9(scheduler=None, **parts):
    """With a denoiser that sees the mask and the masked image."""
    return stable_diffusion_inpaint(scheduler, **{"unet": unet(9), **parts})


def stable_diffusion_xl_inpaint(scheduler=None, **parts):
    return stable_diffusion_xl(scheduler, StableDiffusionXLInpaintPipeline, **parts)


def stable_diffusion_xl_inpaint_9(scheduler=None, **parts):
    return stable_diffusion_xl_inpaint(scheduler, **{"unet": unet_xl(in_channels=9), **parts})


def controlnet(xl=False):
    """A ControlNet for the U-Nets above, whose outputs are not zero as in a fresh one."""

    def build():
        more = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
        }
        made = ControlNetModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            in_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            cross_attention_dim=2 * WIDTH if xl else WIDTH,
            attention_head_dim=4,
            norm_num_groups=4,
            conditioning_embedding_out_channels=(8, 16),
            **(more if xl else {}),
        )
        for block in [*made.controlnet_down_blocks, made.controlnet_mid_block]:
            torch.nn.init.normal_(block.weight, std=0.3)
        return made

    return seeded(build)


def stable_diffusion_controlnet(scheduler=None, kind=StableDiffusionControlNetPipeline, **parts):
    return stable_diffusion(scheduler, kind, **{"controlnet": controlnet(), **parts})


def stable_diffusion_controlnet_img2img(scheduler=None, **parts):
    return stable_diffusion_controlnet(scheduler, StableDiffusionControlNetImg2ImgPipeline, **parts)


def stable_diffusion_controlnet_inpaint(scheduler=None, **parts):
    return stable_diffusion_controlnet(scheduler, StableDiffusionControlNetInpaintPipeline, **parts)


def stable_diffusion_xl_controlnet(
    scheduler=None, kind=StableDiffusionXLControlNetPipeline, **parts
):
    return stable_diffusion_xl(scheduler, kind, **{"controlnet": controlnet(xl=True), **parts})


def stable_diffusion_xl_controlnet_img2img(scheduler=None, **parts):
    return stable_diffusion_xl_controlnet(
        scheduler, StableDiffusionXLControlNetImg2ImgPipeline, **parts
    )


def stable_diffusion_xl_controlnet_inpaint(scheduler=None, **parts):
    return stable_diffusion_xl_controlnet(
        scheduler, StableDiffusionXLControlNetInpaintPipeline, **parts
    )


def latent_consistency(scheduler=None, kind=LatentConsistencyModelPipeline, **parts):
    """Its denoiser is told the guidance scale."""
    scheduler = scheduler or noise_schedule(LCMScheduler, set_alpha_to_one=True)
    return stable_diffusion(scheduler, kind, **{"unet": unet(time_cond_proj_dim=32), **parts})


def latent_consistency_img2img(scheduler=None, **parts):
    return latent_consistency(scheduler, LatentConsistencyModelImg2ImgPipeline, **parts)


def stable_diffusion_3_img2img(scheduler=None, **parts):
    return stable_diffusion_3(scheduler, StableDiffusion3Img2ImgPipeline, **parts)
