"""∇_{x_t} σ_t of eq. 17: through the clean estimate alone, or through the denoiser as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memfree.diffusion_math import predicted_x_0
from memfree.guidance.mitigation_names import Through
from memfree.guidance.prediction import Prediction
from memfree.guidance.similarity import Similarity

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex


def sigma_gradient(
    prediction: Prediction,
    index: ReferenceIndex,
    similarity: Similarity,
    neighbours: Tensor,
    rows: Tensor,
    through: Through,
) -> Tensor:
    """∇_{x_t} σ_t of some rows of the batch, (n, ...) float32; neighbours are not differentiated.

    Args:
        prediction: of the whole batch.
        index: references.
        similarity: σ.
        neighbours: (n, k) int64 rows of the index, those of each sample.
        rows: (n,) int64 rows of the batch.
        through: x̂_0 alone or the denoiser as well, which is called again on both branches.
    """
    with torch.inference_mode(False), torch.enable_grad():
        neighbours = neighbours.clone()
        if through == "denoiser":
            x_t = prediction.x_t[rows].clone().requires_grad_()
            x_0 = _clean_estimate_of(prediction, x_t, rows)
        else:
            x_t = x_0 = prediction.clean_estimate(rows).clone().requires_grad_()
        sigma = similarity.against(index, prediction.decode(x_0), neighbours)
        (gradient,) = torch.autograd.grad(sigma.sum(), x_t)
    if through == "denoiser":
        return gradient.float()
    # With ε̂ constant, ∂x̂_0/∂x_t = 1/√ᾱ (eq. 12), in every parameterisation.
    return gradient / prediction.alpha_bar.sqrt()


def _clean_estimate_of(prediction: Prediction, x_t: Tensor, rows: Tensor) -> Tensor:
    """x̂_0 of other noisy samples at this step, by calling the denoiser on both branches again."""
    cond = uncond = None
    if prediction.output_cond is not None and prediction.conditions is not None:
        cond = prediction.denoise(x_t, prediction.conditions[rows])
    if prediction.output_uncond is not None:
        uncond = prediction.denoise(x_t, None)
    output = prediction.combined(cond, uncond)
    alpha_bar = prediction.alpha_bar.clone()
    return predicted_x_0(x_t.float(), output.float(), alpha_bar, prediction.prediction_type)
