"""Lower classifier-free guidance: the trivial baseline."""

from __future__ import annotations

from dataclasses import dataclass

from jsonargparse.typing import NonNegativeFloat

from memfree.guidance.mitigation import Mitigation


@dataclass
class LowerGuidanceOptions:
    """Options of lower guidance."""

    guidance_scale: NonNegativeFloat = 2.0
    """Largest s_0 that is used; ours, there is no source. 1 is the conditional model alone."""


class LowerGuidance(Mitigation):
    """s_0 ← min(s_0, limit): guidance sharpens towards what the prompt alone brings.

    Args:
        options: the limit.
    """

    def __init__(
        self,
        options: LowerGuidanceOptions = LowerGuidanceOptions(),  # noqa: B008 - read only
    ) -> None:
        self.options = options

    def guidance_scale(self, guidance_scale: float) -> float:
        """The smaller of the user's scale and the limit."""
        return min(guidance_scale, self.options.guidance_scale)
