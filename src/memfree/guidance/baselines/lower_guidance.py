"""Lower classifier-free guidance: the trivial baseline."""

from __future__ import annotations

from memfree.guidance.baselines.options import LowerGuidanceOptions
from memfree.guidance.mitigation import Mitigation


class LowerGuidance(Mitigation):
    """s_0 ← min(s_0, limit): guidance sharpens towards what the prompt alone brings.

    Args:
        options: the limit.

    Raises:
        ValueError: it is below 1.
    """

    def __init__(
        self,
        options: LowerGuidanceOptions = LowerGuidanceOptions(),  # noqa: B008 - read only
    ) -> None:
        if options.guidance_scale < 1:
            raise ValueError(
                "--guidance.lower_guidance.guidance_scale must be at least 1, not "
                f"{options.guidance_scale:g}"
            )
        self.options = options

    def guidance_scale(self, guidance_scale: float) -> float:
        """The smaller of the user's scale and the limit."""
        return min(guidance_scale, self.options.guidance_scale)
