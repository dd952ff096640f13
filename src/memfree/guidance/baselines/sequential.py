"""Several mitigations one after another, as one."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from memfree.conditions import TextConditions
from memfree.guidance.mitigation import Mitigation, Start
from memfree.guidance.prediction import Guidance


class Sequential(Mitigation):
    """Several mitigations: at each stage one after another, what one leaves is the next one's.

    Args:
        mitigations: in order.
    """

    def __init__(self, mitigations: Sequence[Mitigation]) -> None:
        self.mitigations = list(mitigations)

    def prompts(self, prompts: Sequence[str], generators: Sequence[torch.Generator]) -> list[str]:
        """Pass the prompts down the list."""
        changed = list(prompts)
        for one in self.mitigations:
            changed = one.prompts(changed, generators)
        return changed

    def embedding(self, start: Start) -> TextConditions:
        """Pass the conditions down the list."""
        for one in self.mitigations:
            start = replace(start, conditions=one.embedding(start))
        return start.conditions

    def initial_noise(self, start: Start) -> Tensor:
        """Pass the noise down the list."""
        for one in self.mitigations:
            start = replace(start, noise=one.initial_noise(start))
        return start.noise

    def changes_start(self) -> bool:
        """Whether any of them does."""
        return any(one.changes_start() for one in self.mitigations)

    def guidance_scale(self, guidance_scale: float) -> float:
        """Pass s_0 down the list."""
        for one in self.mitigations:
            guidance_scale = one.guidance_scale(guidance_scale)
        return guidance_scale

    def around(self, network: Any) -> AbstractContextManager[Any]:
        """Enter all, the first outermost."""
        return self._around(network)

    @contextmanager
    def _around(self, network: Any) -> Generator[None]:
        with ExitStack() as stack:
            for one in self.mitigations:
                stack.enter_context(one.around(network))
            yield

    def guidances(self) -> list[Guidance]:
        """All guidances, in order."""
        return [guidance for one in self.mitigations for guidance in one.guidances()]

    def accept(self, images: Tensor) -> Tensor:
        """Kept are the images that all accept."""
        kept = super().accept(images)
        for one in self.mitigations:
            kept = kept & one.accept(images)
        return kept
