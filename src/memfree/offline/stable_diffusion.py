"""A small Stable Diffusion pipeline without downloads: its parts and its autoencoder's training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import models, pre_tokenizers, trainers
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from memfree.data.random_streams import autoencoder_step_generator
from memfree.models.module import CHECKPOINT_KEY, adamw
from memfree.models.options import AutoencoderOptions, ScratchOptions

START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: Sequence[str], options: ScratchOptions) -> CLIPTokenizer:
    """A CLIP tokenizer with a byte-pair vocabulary learnt from captions; every byte is a token."""
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


def _text_encoder(tokenizer: CLIPTokenizer, options: ScratchOptions) -> CLIPTextModel:
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


def _unet(vae: Any, options: ScratchOptions) -> Any:
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
    """A whole pipeline around a trained AutoencoderKL; its other weights are drawn from ``seed``.

    The tokenizer learns its vocabulary from ``captions``.
    """
    tokenizer = train_tokenizer(captions, options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = _text_encoder(tokenizer, options)
        unet = _unet(vae, options)
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


class AutoencoderModule(pl.LightningModule):
    """Trains an ``AutoencoderKL``: L1 reconstruction plus a small Kullback-Leibler term.

    The loss is that of latent diffusion (Rombach et al., CVPR 2022, section 3.1 and appendix G)
    without its perceptual and adversarial terms, which need networks of their own.
    """

    def __init__(
        self, options: AutoencoderOptions, images: Tensor, seed: int = 0, data: Any = None
    ) -> None:
        """Build the network with weights drawn from ``seed``.

        Args:
            options: shape and training.
            images: (N, 3, H, W) training images in [−1, 1], held in memory.
            seed: of the weights and of all draws.
            data: identity of the images, a JSON value that a checkpoint must agree on.
        """
        super().__init__()
        self.options, self.seed, self.data, self._images = options, seed, data, images
        levels = len(options.block_out_channels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network: Any = AutoencoderKL(
                in_channels=images.shape[1],
                out_channels=images.shape[1],
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                block_out_channels=tuple(options.block_out_channels),
                layers_per_block=1,
                latent_channels=options.latent_channels,
                norm_num_groups=options.norm_num_groups,
                sample_size=images.shape[2],
            )

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be resumed from, as JSON values."""
        options = {"autoencoder": asdict(self.options), "images": list(self._images.shape)}
        return json.loads(json.dumps({**options, "data": self.data, "seed": self.seed}))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write into the checkpoint which training it is of."""
        checkpoint[CHECKPOINT_KEY] = self.identity()

    def train_dataloader(self) -> list[int]:
        """As many entries as steps; what a step draws depends on its number and the seed."""
        return list(range(self.options.steps))

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Leave the number of the step as it is."""
        return batch

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """Loss of one batch of shifted and mirrored images."""
        generator = autoencoder_step_generator(self.seed, self.global_step)
        return self.loss(self.batch(generator).to(self.device), generator)

    def batch(self, generator: torch.Generator) -> Tensor:
        """Images (batch_size, 3, H, W), each mirrored or not and moved over a white border."""
        size, reach = self.options.batch_size, self.options.shift
        chosen = self._images[torch.randint(len(self._images), (size,), generator=generator)]
        flipped = torch.rand(size, generator=generator) < 0.5
        chosen = torch.where(flipped[:, None, None, None], chosen.flip(3), chosen)
        height, width = chosen.shape[2:]
        padded = torch.nn.functional.pad(chosen, (reach,) * 4, value=1.0)
        corners = torch.randint(2 * reach + 1, (size, 2), generator=generator).tolist()
        return torch.stack(
            [
                image[:, top : top + height, left : left + width]
                for image, (top, left) in zip(padded, corners, strict=True)
            ]
        )

    def loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Mean absolute error a value plus ``kl_weight`` · Kullback-Leibler divergence a latent."""
        distribution = self.network.encode(images).latent_dist
        noise = torch.randn(distribution.mean.shape, generator=generator).to(images.device)
        decoded = self.network.decode(distribution.mean + distribution.std * noise).sample
        divergence = distribution.kl().mean() / distribution.mean[0].numel()
        return (decoded - images).abs().mean() + self.options.kl_weight * divergence

    def configure_optimizers(self) -> Any:
        """AdamW with a one-cycle schedule."""
        rate = float(self.options.learning_rate)
        # Not warm_up: it begins at rate / 25, and moves the momentum the other way.
        cycle = partial(OneCycleLR, max_lr=rate, total_steps=int(self.options.steps), pct_start=0.1)
        return adamw(self.network.parameters(), rate, cycle)

    @torch.no_grad()
    def finish(self) -> AutoencoderKL:
        """The trained network, its scaling factor set so that latents have unit variance."""
        self.network.eval().requires_grad_(False)
        latents = torch.cat(
            [self.network.encode(part).latent_dist.mean for part in self._images.split(64)]
        )
        scale = 1 / float(latents.std())
        self.network.register_to_config(scaling_factor=scale)
        return self.network
