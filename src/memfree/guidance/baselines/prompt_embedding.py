"""Changed prompt embeddings: Gaussian noise (Somepalli et al.), optimised (Wen et al.)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from memfree.conditions import TextConditions
from memfree.diffusion_math import eps_change
from memfree.guidance.baselines.options import EmbeddingNoiseOptions, PromptEmbeddingOptions
from memfree.guidance.baselines.wen_norm import size_factor
from memfree.guidance.mitigation import Mitigation, Start
from memfree.guidance.prediction import row_norm


@dataclass(eq=False)
class EmbeddingNoise(Mitigation):
    """GNI: y ← y + λ·N(0, 1) on every entry of the prompt's embedding.

    Source: Somepalli et al., arXiv 2305.20086. Their program adds noise to the unconditional
    embedding too; here only the prompt's changes, without SDXL's pooled embedding.
    """

    options: EmbeddingNoiseOptions = field(default_factory=EmbeddingNoiseOptions)

    def embedding(self, start: Start) -> TextConditions:
        """Add the noise, drawn from each sample's own generator."""
        if self.options.strength == 0:
            return start.conditions
        embeddings = start.conditions.embeddings
        drawn = [
            torch.randn(embeddings.shape[1:], generator=generator, dtype=torch.float32)
            for generator in start.generators
        ]
        noise = torch.stack(drawn).to(embeddings)
        return replace(start.conditions, embeddings=embeddings + self.options.strength * noise)


@dataclass(eq=False)
class PromptEmbeddingOptimization(Mitigation):
    """Minimise ‖ε_θ(x_T, y) − ε_θ(x_T)‖ over the embedding of the prompt, by AdamW, until below l.

    Source: Wen et al., "Detecting, Explaining, and Mitigating Memorization in Diffusion Models",
    ICLR 2024, arXiv 2407.21720. As in the authors' program the begin-of-text token gets no gradient
    and AdamW has torch's weight decay. Theirs optimises one embedding for all images of a prompt;
    here each sample has its own. SDXL's pooled embedding stays as it is.
    """

    options: PromptEmbeddingOptions = field(default_factory=PromptEmbeddingOptions)

    def embedding(self, start: Start) -> TextConditions:
        """Optimise the embeddings of samples above l; the others keep their bits."""
        with torch.inference_mode(False):
            noise = start.noise.clone()
            with torch.no_grad():
                uncond = start.denoise(noise, start.unconditional).clone()
            alpha_bar = start.alpha_bar.clone()

            def difference(conditions: TextConditions, rows: Tensor) -> Tensor:
                change = start.denoise(noise[rows], conditions) - uncond[rows]
                return eps_change(change, alpha_bar, start.prediction_type)

            factor = size_factor(tuple(noise.shape[1:]), self.options.per_element)
            return optimized(start.conditions, difference, self.options, factor)[0]


def optimized(
    conditions: TextConditions,
    difference: Callable[[TextConditions, Tensor], Tensor],
    options: PromptEmbeddingOptions,
    factor: float = 1.0,
) -> tuple[TextConditions, Tensor]:
    """Wen's optimisation of embeddings (B, ...), and (B,) bool: which were above the threshold.

    ``difference`` maps conditions (n, ...) and their rows of the batch (n,) to ε_c − ε_∅ (n, ...);
    ``factor`` multiplies the threshold (``size_factor``). Samples are optimised separately.
    """
    original = conditions.embeddings
    rows = torch.arange(len(original), device=original.device)
    above_at_first = torch.zeros(len(original), dtype=torch.bool, device=original.device)
    with torch.inference_mode(False), torch.enable_grad():
        # One parameter per sample: AdamW skips the stopped ones, which have no gradient.
        own = [row.detach().float().clone().requires_grad_() for row in original]
        adam = torch.optim.AdamW(own, lr=options.learning_rate)
        for iteration in range(options.iterations):
            embeddings = torch.stack([own[row] for row in rows.tolist()]).to(original.dtype)
            norm = row_norm(difference(replace(conditions[rows], embeddings=embeddings), rows))
            above = norm.detach() > options.target * factor
            rows = rows[above]
            if iteration == 0:
                above_at_first[rows] = True
            if not len(rows):
                break
            parameters = [own[row] for row in rows.tolist()]
            gradients = torch.autograd.grad(norm[above].sum(), parameters)
            adam.zero_grad()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
                parameter.grad[0] = 0
            adam.step()
        new = torch.stack([row.detach() for row in own]).to(original.dtype)
    return replace(conditions, embeddings=new), above_at_first
