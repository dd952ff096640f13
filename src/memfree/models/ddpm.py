"""Pixel-space denoising diffusion as a Lightning module around a diffusers U-Net."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMPipeline
from torch import Tensor

from memfree.diffusion_math import per_sample, training_target
from memfree.models.module import DiffusionModule, weighted_mean
from memfree.models.network import build_network
from memfree.models.noise_schedule import build_scheduler
from memfree.models.options import ModelOptions


class DDPMModule(DiffusionModule):
    """Trains a U-Net to predict ε or v, unconditionally or with labels.

    A batch is a dict: ``image`` (B, C, H, W) in [-1, 1]; ``label`` (B,) int64 for a
    class-conditional model; optionally ``weight``, a number or (B,), which multiplies the loss.
    """

    def __init__(
        self,
        options: ModelOptions,
        image_shape: tuple[int, int, int],
        num_classes: int | None = None,
        seed: int = 0,
        data: dict[str, Any] | None = None,
        stepping: dict[str, Any] | None = None,
    ) -> None:
        """Build the network with weights drawn from ``seed``.

        Args:
            options: network, noise schedule, optimisation.
            image_shape: (C, H, W).
            num_classes: labels are 0 to num_classes − 1; needed by a class-conditional model.
            seed: of weights and of all that training draws.
            data: what the images are; see ``DiffusionModule``.
            stepping: how the Trainer takes a step; see ``DiffusionModule``.

        Raises:
            ValueError: options that do not fit together, or no labels for a conditional model.
        """
        super().__init__(options, image_shape, seed, data, stepping)
        if options.class_conditional and num_classes is None:
            raise ValueError(
                "--model.class_conditional needs labels, and the dataset has none: "
                "set it to false or prepare labelled data"
            )
        self.num_classes = num_classes if options.class_conditional else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = build_network(options.network, image_shape, self.num_classes)
        self.set_network(network, build_scheduler(options.noise))

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Loss of a batch, 0-d: mean over images of weight · mean over pixels of the square.

        Args:
            batch: see the class.
            generator: on the batch's device.
        """
        x_0: Tensor = batch["image"]
        count, device = len(x_0), x_0.device
        noise = torch.randn(x_0.shape, generator=generator, device=device, dtype=x_0.dtype)
        t = torch.randint(len(self.alphas_cumprod), (count,), generator=generator, device=device)
        alpha_bar = self.alphas_cumprod[t]  # (B,)
        a = per_sample(alpha_bar, x_0)
        x_t = a.sqrt() * x_0 + (1 - a).sqrt() * noise
        labels = None
        if self.num_classes is not None:
            dropped = (
                torch.rand(count, generator=generator, device=device) < self.options.label_dropout
            )
            labels = batch["label"].masked_fill(dropped, self.num_classes)
        prediction = self.network(x_t, t, class_labels=labels, return_dict=False)[0]
        target = training_target(x_0, noise, alpha_bar, self.options.noise.prediction_type)
        return weighted_mean((prediction.float() - target).square(), batch.get("weight", 1.0))

    def facts(self) -> dict[str, Any]:
        """The number of classes, null for an unconditional model."""
        return {"num_classes": self.num_classes}

    def pipeline(self) -> Any:
        """A ``DDPMPipeline``: the network and the scheduler."""
        pipeline: Any = DDPMPipeline
        return pipeline(unet=self.network, scheduler=self.noise_scheduler)

    @torch.no_grad()
    def preview(self, count: int, steps: int, seed: int) -> Tensor:
        """Samples (count, C, H, W); labels are 0, 1, 2, ... in turn."""
        generator = torch.Generator().manual_seed(seed)
        x_t = torch.randn((count, *self.image_shape), generator=generator, dtype=torch.float32)
        x_t = x_t.to(self.device)
        labels = None
        if self.num_classes is not None:
            labels = torch.arange(count, device=self.device) % self.num_classes
        scheduler = DDIMScheduler.from_config(
            self.noise_scheduler.config, timestep_spacing="trailing"
        )
        scheduler.set_timesteps(min(steps, len(self.alphas_cumprod)))
        was_training = self.network.training
        self.network.eval()
        for t in scheduler.timesteps:
            output = self.network(x_t, t.to(x_t.device), class_labels=labels, return_dict=False)[0]
            x_t = scheduler.step(output, t, x_t, return_dict=False)[0]
        self.network.train(was_training)
        return x_t.clamp(-1, 1)
