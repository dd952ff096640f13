"""A small copy-detection network trained with SSCD's recipe, as a Lightning module."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional

from memfree.models.augmentation import augment
from memfree.models.contrastive import info_nce, koleo
from memfree.models.options import CopyDetectionOptions
from memfree.models.short_training import adamw_with_cosine, step_generator
from memfree.retrieval.copy_detection import CopyDetectionNetwork, CopyDetectionShape, resized


class CopyDetectionModule(pl.LightningModule):
    """Trains a network so that two changed copies of an image meet and strangers spread out.

    Loss of Pizzi et al. (CVPR 2022, arXiv 2202.10261): InfoNCE + λ · KoLeo on normalised
    embeddings of two augmented views. A batch is a dictionary with ``image`` (B, C, H, W) in
    [-1, 1] and ``group`` (B,). What a step draws depends on the seed and its number alone.

    Args:
        options: loss, optimizer and augmentation.
        shape: size of the network.
        seed: of the weights and of all that training draws.
    """

    def __init__(
        self, options: CopyDetectionOptions, shape: CopyDetectionShape, seed: int = 0
    ) -> None:
        super().__init__()
        if options.augmentation.smallest_crop == 0:
            raise ValueError("--model.augmentation.smallest_crop 0: keep more than nothing")
        self.options, self.shape, self.seed = options, shape, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = CopyDetectionNetwork(shape)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of two random views of a batch."""
        return self.loss(batch, step_generator(self.seed, batch_idx, self.device))

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """InfoNCE + λ · KoLeo, 0-d.

        Args:
            batch: see the class.
            generator: on the batch's device.
        """
        images = resized(batch["image"], self.shape.size)
        views = [augment(images, self.options.augmentation, generator) for _ in range(2)]
        embedded = functional.normalize(self.network(torch.cat(views)).float(), dim=1)
        first, second = embedded.chunk(2)
        contrast = info_nce(first, second, self.options.temperature, batch["group"])
        if self.options.entropy_weight == 0:
            return contrast
        return contrast + self.options.entropy_weight * koleo(first, second, batch["group"])

    def configure_optimizers(self) -> Any:
        """AdamW, a short warm-up, then a cosine to 0."""
        return adamw_with_cosine(
            self, float(self.options.learning_rate), float(self.options.weight_decay)
        )
