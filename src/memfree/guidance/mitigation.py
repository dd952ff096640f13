"""Mitigation: stages that change prompts, noise, guidance or acceptance, and combinations."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memfree.conditions import TextConditions
from memfree.diffusion_math import PredictionType, eps_change
from memfree.guidance.options import imported
from memfree.guidance.prediction import Guidance
from memfree.guidance.similarity import Similarity

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex


@dataclass(frozen=True)
class Start:
    """The state before the first denoising step of a batch of text-to-image samples."""

    noise: Tensor  # x_T (B, C, H, W), standard normal
    conditions: TextConditions  # Encoded prompts, (B, ...)
    unconditional: TextConditions  # The encoded empty (or negative) prompt of each sample, (B, ...)
    denoise: Callable[[Tensor, TextConditions], Tensor]  # (x_T, y) → output; differentiable
    alpha_bar: Tensor  # ᾱ of the first timestep, 0-d float32
    prediction_type: PredictionType
    guidance_scale: float  # s_0 of classifier-free guidance
    generators: Sequence[torch.Generator]  # One per sample, on the CPU; never the global one

    def eps_difference(self, noise: Tensor, conditions: TextConditions) -> Tensor:
        """ε_θ(x_T, y) − ε_θ(x_T) (B, C, H, W), whose norm is large for memorized prompts (Wen)."""
        difference = self.denoise(noise, conditions) - self.denoise(noise, self.unconditional)
        return eps_change(difference, self.alpha_bar, self.prediction_type)


class Mitigation:
    """A way to keep a model from copying: six stages, each of which changes nothing by default.

    They run in the order of this class, on whole batches, and leave samples independent.
    """

    def prompts(self, prompts: Sequence[str], generators: Sequence[torch.Generator]) -> list[str]:
        """Change a batch's prompts, with one generator per sample."""
        return list(prompts)

    def embedding(self, start: Start) -> TextConditions:
        """Change the encoded prompts."""
        return start.conditions

    def initial_noise(self, start: Start) -> Tensor:
        """Change x_T."""
        return start.noise

    def changes_start(self) -> bool:
        """Whether embedding or initial noise may change, which takes a ``Start``."""
        own = type(self)
        return (
            own.embedding is not Mitigation.embedding
            or own.initial_noise is not Mitigation.initial_noise
        )

    def guidance_scale(self, guidance_scale: float) -> float:
        """Change s_0."""
        return guidance_scale

    def around(self, network: Any) -> AbstractContextManager[Any]:
        """Change the network (a diffusers model) while samples are drawn."""
        return nullcontext()

    def guidances(self) -> list[Guidance]:
        """Change the prediction of every step, in order."""
        return []

    def accept(self, images: Tensor) -> Tensor:
        """(B,) bool: which finished images (B, C, H, W) in [−1, 1] are kept; others are redrawn."""
        return torch.ones(len(images), dtype=torch.bool, device=images.device)


def mitigation_at(path: str) -> Mitigation:
    """Import ``package.module.Name``: a mitigation, or a class of one without arguments."""
    value = imported(path)
    if isinstance(value, Mitigation):
        return value
    if not isinstance(value, type) or not issubclass(value, Mitigation):
        raise ValueError(f"--mitigation {path} is not a memfree.guidance.Mitigation")
    try:
        return value()
    except TypeError as error:
        raise ValueError(
            f"--mitigation {path} cannot be made without arguments: name an instance ({error})"
        ) from error


class Sequential(Mitigation):
    """Several mitigations in order: each stage passes its result to the next mitigation."""

    def __init__(self, mitigations: Sequence[Mitigation]) -> None:
        self.mitigations = list(mitigations)

    def prompts(self, prompts: Sequence[str], generators: Sequence[torch.Generator]) -> list[str]:
        """Pass the prompts down the list."""
        changed = list(prompts)
        for mitigation in self.mitigations:
            changed = mitigation.prompts(changed, generators)
        return changed

    def embedding(self, start: Start) -> TextConditions:
        """Pass the conditions down the list."""
        for mitigation in self.mitigations:
            start = replace(start, conditions=mitigation.embedding(start))
        return start.conditions

    def initial_noise(self, start: Start) -> Tensor:
        """Pass the noise down the list."""
        for mitigation in self.mitigations:
            start = replace(start, noise=mitigation.initial_noise(start))
        return start.noise

    def changes_start(self) -> bool:
        """Whether any of them does."""
        return any(mitigation.changes_start() for mitigation in self.mitigations)

    def guidance_scale(self, guidance_scale: float) -> float:
        """Pass s_0 down the list."""
        for mitigation in self.mitigations:
            guidance_scale = mitigation.guidance_scale(guidance_scale)
        return guidance_scale

    @contextmanager
    def around(self, network: Any) -> Generator[None]:
        """Enter all, the first outermost."""
        with ExitStack() as stack:
            for mitigation in self.mitigations:
                stack.enter_context(mitigation.around(network))
            yield

    def guidances(self) -> list[Guidance]:
        """All guidances, in order."""
        return [guidance for mitigation in self.mitigations for guidance in mitigation.guidances()]

    def accept(self, images: Tensor) -> Tensor:
        """Keep the images that all accept."""
        kept = super().accept(images)
        for mitigation in self.mitigations:
            kept = kept & mitigation.accept(images)
        return kept


class Guided(Mitigation):
    """Changes predictions alone, by guidances in order."""

    def __init__(self, guidances: Sequence[Guidance]) -> None:
        self._guidances = list(guidances)

    def guidances(self) -> list[Guidance]:
        """The given guidances."""
        return list(self._guidances)


class RejectAndResample(Mitigation):
    """Redraw a sample while its σ is above ``threshold``, the index's calibrated one."""

    def __init__(self, index: ReferenceIndex, similarity: Similarity, threshold: float) -> None:
        self.index = index
        self.similarity = similarity
        self.threshold = threshold

    @torch.no_grad()
    def accept(self, images: Tensor) -> Tensor:
        """σ ≤ threshold of finished images (B, C, H, W), (B,) bool."""
        return self.similarity(self.index, images).sigma <= self.threshold


def attempts(
    count: int, budget: int, rejected: Callable[[Tensor], Tensor]
) -> Iterator[tuple[int, Tensor]]:
    """Number and positions (b,) of ``budget`` attempts at most: all samples, then the rejected."""
    positions = torch.arange(count)
    yield 0, positions
    for attempt in range(1, budget):
        positions = positions[rejected(positions)]
        if not len(positions):
            return
        yield attempt, positions
