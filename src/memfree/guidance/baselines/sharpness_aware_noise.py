"""SAIL: optimise the initial noise until the model's probability is less sharp there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from memfree.diffusion_math import per_sample
from memfree.guidance.baselines.options import SharpnessAwareOptions
from memfree.guidance.baselines.wen_norm import size_factor
from memfree.guidance.mitigation import Mitigation, Start
from memfree.guidance.prediction import row_norm


@dataclass(eq=False)
class SharpnessAwareInitialization(Mitigation):
    """SAIL: minimise ‖Δ(x_T + Δ(x_T)/‖Δ(x_T)‖)‖ + α·‖x_T‖ with Δ = ε_c − ε_∅, by Adam.

    The first term is a finite difference for the difference of the Hessians along that of the
    scores. Source: Jeon, Kim and No, "Understanding and Mitigating Memorization in Generative
    Models via Sharpness of Probability Landscapes", ICML 2025, arXiv 2412.04140, algorithm 2. The
    authors' program keeps the inner Δ at the initial noise; here it is at the present x_T. Under
    v-prediction theirs steps along −Δ, here along Δ as for ε. Without a candidate below the
    threshold theirs restarts with the threshold raised by 0.1; here the smallest loss wins.
    """

    options: SharpnessAwareOptions = field(default_factory=SharpnessAwareOptions)

    def initial_noise(self, start: Start) -> Tensor:
        """x_T of each sample, from its own candidates; the first below the threshold."""
        with torch.inference_mode(False), torch.enable_grad():
            rows = [self._of_sample(start, row) for row in range(len(start.noise))]
        return torch.stack(rows)

    def _of_sample(self, start: Start, row: int) -> Tensor:
        own, generator = start.noise[row], start.generators[row]
        others = [
            torch.randn(own.shape, generator=generator, dtype=torch.float32).to(own)
            for _ in range(self.options.candidates - 1)
        ]
        drawn = torch.stack([own, *others])
        repeated = torch.full((len(drawn),), row, device=own.device)
        candidates = replace(
            start,
            noise=drawn,
            conditions=start.conditions[repeated],
            unconditional=start.unconditional[repeated],
            alpha_bar=start.alpha_bar.clone(),
            generators=[generator] * len(drawn),
        )
        return self._optimized(candidates)

    def _optimized(self, start: Start) -> Tensor:
        factor = size_factor(tuple(start.noise.shape[1:]), self.options.per_element)
        x = start.noise.float().clone().requires_grad_()
        adam = torch.optim.Adam([x], lr=self.options.learning_rate)
        for iteration in range(self.options.iterations):
            loss = self._loss(start, x, factor)
            best = int(loss.argmin())
            below = (loss <= self.options.threshold * factor).nonzero().squeeze(1)
            if len(below) or iteration == self.options.iterations - 1:
                best = int(below[0]) if len(below) else best
                break
            (x.grad,) = torch.autograd.grad(loss.sum(), [x])
            adam.step()
        return x.detach()[best].to(start.noise.dtype)

    def _loss(self, start: Start, x: Tensor, factor: float) -> Tensor:
        noise = x.to(start.noise.dtype)
        first = start.eps_difference(noise, start.conditions).float()
        length = row_norm(first).clamp(min=torch.finfo(torch.float32).tiny)
        step = factor * first / per_sample(length, first)
        second = start.eps_difference((x + step).to(noise.dtype), start.conditions)
        return row_norm(second) + self.options.gaussianity * row_norm(x)
