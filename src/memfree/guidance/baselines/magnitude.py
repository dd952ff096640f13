"""‖ε_c − ε_∅‖, and thresholds on it for latents of any size."""

from __future__ import annotations

from math import prod, sqrt

from torch import Tensor

from memfree.diffusion_math import eps_change
from memfree.guidance.prediction import Prediction, row_norm

REFERENCE_ELEMENTS = 4 * 64 * 64
"""Elements of the latents of Stable Diffusion 1.4 at 512×512, on which the papers tuned."""


def size_factor(shape: tuple[int, ...], per_element: bool) -> float:
    """What a length tuned on 4×64×64 latents is multiplied by, for latents of another size.

    The norm of a vector whose entries have a given root mean square grows with √elements:
    √(elements / 16384) keeps the threshold on the root mean square, and is 1 at 4×64×64.

    Args:
        shape: (C, H, W) of one sample.
        per_element: False keeps the papers' number, whatever the size.
    """
    return sqrt(prod(shape) / REFERENCE_ELEMENTS) if per_element else 1.0


def magnitude(prediction: Prediction, method: str) -> Tensor:
    """‖ε_θ(x_t, y) − ε_θ(x_t)‖ of each sample, (B,) float32.

    Args:
        prediction: of a step with both branches.
        method: who asks, for the message.

    Raises:
        ValueError: classifier-free guidance is off, so that there is one branch.
    """
    cond, uncond = branches(prediction, method)
    return eps_norm(prediction, cond.float() - uncond.float())


def eps_norm(prediction: Prediction, change: Tensor) -> Tensor:
    """‖Δε‖ of a change (b, ...) of the denoiser's output at this step, (b,) float32."""
    return row_norm(eps_change(change.float(), prediction.alpha_bar, prediction.prediction_type))


def branches(prediction: Prediction, method: str) -> tuple[Tensor, Tensor]:
    """The conditional and the unconditional branch.

    Raises:
        ValueError: there is one branch.
    """
    if prediction.output_cond is None or prediction.output_uncond is None:
        raise ValueError(f"{method} needs classifier-free guidance: --guidance_scale above 1")
    return prediction.output_cond, prediction.output_uncond
