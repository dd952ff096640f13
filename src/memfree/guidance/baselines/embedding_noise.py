"""GNI: Gaussian noise on the text embedding (Somepalli et al., 2023)."""

from __future__ import annotations

from dataclasses import replace

import torch

from memfree.conditions import TextConditions
from memfree.guidance.baselines.options import EmbeddingNoiseOptions
from memfree.guidance.mitigation import Mitigation, Start


class EmbeddingNoise(Mitigation):
    """GNI: y ← y + λ·N(0, 1) on every entry of the prompt's embedding.

    Source: Somepalli et al., arXiv 2305.20086, inference-time mitigation. Their program adds the
    noise to the unconditional embedding as well (it wraps the pipeline's encoding of both); here
    it is the prompt's alone, and the pooled embedding of SDXL stays as it is.

    Args:
        options: strength.
    """

    def __init__(
        self,
        options: EmbeddingNoiseOptions = EmbeddingNoiseOptions(),  # noqa: B008 - read only
    ) -> None:
        self.options = options

    def embedding(self, start: Start) -> TextConditions:
        """Add the noise, drawn from each sample's own generator."""
        if self.options.strength == 0:
            return start.conditions
        embeddings = start.conditions.embeddings
        noise = torch.stack(
            [
                torch.randn(embeddings.shape[1:], generator=one, dtype=torch.float32)
                for one in start.generators
            ]
        ).to(embeddings)
        return replace(start.conditions, embeddings=embeddings + self.options.strength * noise)
