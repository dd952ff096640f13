"""Losses of SSCD: contrastive InfoNCE, and the spread of embeddings by differential entropy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def info_nce(first: Tensor, second: Tensor, temperature: float, group: Tensor) -> Tensor:
    """NT-Xent over two views of each image (Chen et al. 2020; Pizzi et al. 2022, eq. 1), 0-d.

    Mean over the 2B embeddings z_i of −log(exp(z_i·z_p/τ) / Σ_j exp(z_i·z_j/τ)), z_p the other
    view of the same image, j all embeddings but i and other images of i's group, which are neither
    copies nor strangers.

    Args:
        first: (B, D) unit vectors.
        second: (B, D) unit vectors of other views of the same images, in the same order.
        temperature: τ > 0.
        group: (B,) images of equal numbers belong together.
    """
    views = torch.cat([first, second])
    count = len(first)
    logits = views @ views.T / temperature
    number = torch.arange(count, device=views.device).repeat(2)
    groups = group.repeat(2)
    own = number[:, None] == number[None, :]
    left_out = (groups[:, None] == groups[None, :]) & ~own
    left_out.fill_diagonal_(True)
    positive = torch.arange(2 * count, device=views.device).roll(count)
    return functional.cross_entropy(logits.masked_fill(left_out, float("-inf")), positive)


def koleo(first: Tensor, second: Tensor, group: Tensor) -> Tensor:
    """Kozachenko–Leonenko estimate of negative entropy (Pizzi et al. 2022, eq. 2), 0-d.

    −mean log ‖z_i − z_j‖ over the 2B embeddings, z_j the nearest of another group: small when all
    directions are used, so that distances between strangers are alike everywhere.

    Args:
        first: (B, D) unit vectors.
        second: (B, D) unit vectors of other views, in the same order.
        group: (B,) images of equal numbers belong together; at least two differ.
    """
    views = torch.cat([first, second])
    groups = group.repeat(2)
    cosine = (views @ views.T).masked_fill(groups[:, None] == groups[None, :], -2)
    nearest = cosine.amax(1)
    # ‖z_i − z_j‖² = 2 − 2 z_i·z_j; the floor bounds the gradient where two nearly agree.
    return -(2 - 2 * nearest).clamp(min=1e-6).log().mean() / 2
