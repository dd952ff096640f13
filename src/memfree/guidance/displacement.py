"""What we add to AMG's G_sim: a limit on how far it moves x̂_0, and a last correction."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memfree.diffusion_math import per_sample
from memfree.guidance.similarity import Similarity

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex


def limit_displacement(g_sim: Tensor, alpha_bar: Tensor, max_displacement: float) -> Tensor:
    """Shorten G_sim so that x̂_0 moves by at most ``max_displacement``.

    Adding G to ε̂ moves x̂_0 by −√((1−ᾱ)/ᾱ)·G, which grows without bound towards noise.

    Args:
        g_sim: (B, ...), the change of ε̂.
        alpha_bar: ᾱ_t.
        max_displacement: root mean square over a sample's elements, in units of x̂_0
            (images span [−1, 1]).
    """
    moved = g_sim.flatten(1).square().mean(dim=1).sqrt() * ((1 - alpha_bar) / alpha_bar).sqrt()
    factor = (max_displacement / moved.clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1)
    return per_sample(factor, g_sim) * g_sim


def move_below(
    index: ReferenceIndex,
    similarity: Similarity,
    x_0: Tensor,
    target: float,
    image_range: float | None,
    decode: Callable[[Tensor], Tensor] = lambda x_0: x_0,
    iterations: int = 20,
    offset: Tensor | None = None,
    free: Tensor | None = None,
) -> Tensor:
    """Move clean estimates along −∇σ until every σ is at most ``target``, by Newton steps.

    A step of (σ − target)/‖∇σ‖² reaches the target exactly where σ is linear; the neighbour is
    searched again each time, since another may come near. It is the smallest change that leaves
    the copy region: a last resort, after guidance has done what it could.

    Args:
        index: the references.
        similarity: σ.
        x_0: clean estimates (B, ...): images, or what ``decode`` makes images of.
        target: σ to reach, in units of the similarity.
        image_range: keep x_0 in ±image_range; None for no limit.
        decode: from x_0 to images (B, C, H, W) in [−1, 1].
        iterations: the most steps taken.
        offset: like x_0, added to it before it is decoded; None: nothing.
        free: like x_0, bool: which elements may move, such as those that inpainting draws; None:
            all of them.

    Returns:
        The moved estimates, like x_0; rows at or below the target keep their bits.
    """
    x_0 = x_0.clone()
    rows = torch.arange(len(x_0), device=x_0.device)
    anywhere = _any_direction(x_0)
    for _ in range(iterations):
        with torch.enable_grad():
            moving = x_0[rows].requires_grad_()
            sample = moving if offset is None else moving + offset[rows]
            sigma = similarity(index, decode(sample)).sigma
            (gradient,) = torch.autograd.grad(sigma.sum(), moving)
        above = (sigma.detach() > target).nonzero().squeeze(1)
        if not len(above):
            break
        rows, gradient, excess = rows[above], gradient[above], sigma.detach()[above] - target
        if free is not None:
            gradient = gradient * free[rows]
        gradient = _never_zero(gradient, anywhere)
        if image_range is not None:
            # Pixels at the edge of the range cannot move outwards: the others do it.
            outwards = (x_0[rows] * -gradient.sign()) >= image_range
            gradient = _never_zero(gradient.masked_fill(outwards, 0.0), anywhere)
        square = gradient.flatten(1).square().sum(dim=1)
        # 1 % past the target, so that rounding does not leave a sample on the line.
        step = per_sample((excess + 0.01 * abs(target)) / square, gradient) * gradient
        if free is not None:
            step = step * free[rows]
        moved = x_0[rows] - step
        x_0[rows] = moved if image_range is None else moved.clamp(-image_range, image_range)
    return x_0


def _any_direction(like: Tensor) -> Tensor:
    """A fixed direction of length 1, as one row of ``like`` (B, ...)."""
    generator = torch.Generator().manual_seed(0)
    anywhere = torch.randn(like.shape[1:], generator=generator, dtype=torch.float32).to(like)
    return anywhere / anywhere.norm()


def _never_zero(gradient: Tensor, anywhere: Tensor) -> Tensor:
    """The gradient, or any direction where there is none: on top of a reference, none is wrong."""
    zero = per_sample(gradient.flatten(1).abs().amax(dim=1) < 1e-6, gradient)
    return torch.where(zero, anywhere, gradient)
