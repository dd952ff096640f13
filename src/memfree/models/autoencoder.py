"""The small autoencoder of a text-to-image model that is built from nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from memfree.models.module import CHECKPOINT_KEY
from memfree.models.options import AutoencoderOptions


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
            data: which images they are, a JSON value that a checkpoint must agree on.
        """
        super().__init__()
        self.options = options
        self.seed = seed
        self.data = data
        self._images = images
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
        """What a checkpoint must agree on to be resumed, as JSON values."""
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
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.global_step)
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
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rate, total_steps=int(self.options.steps), pct_start=0.1
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

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
