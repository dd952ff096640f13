"""Lower classifier-free guidance: the trivial baseline."""

from __future__ import annotations

from dataclasses import dataclass

from jsonargparse.typing import restricted_number_type

from memfree.guidance.mitigation import Mitigation

AtLeastOne = restricted_number_type("AtLeastOne", float, (">=", 1))
"""s_0 from 1 on."""


@dataclass
class LowerGuidanceOptions:
    """Options of lower guidance."""

    guidance_scale: AtLeastOne = 2.0  # type: ignore[valid-type]
    """Largest s_0 that is used; ours, there is no source. 1, the least, is the conditional model
    alone: diffusers takes no smaller one for less guidance, but for none."""


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
