"""A tiny random U-Net with text conditions, and the records that mitigations take."""

import torch
from tiny_pipelines import unet

from memfree.conditions import TextConditions
from memfree.guidance.mitigation import Start
from memfree.guidance.prediction import Prediction, combine

SHAPE = (4, 8, 8)
TOKENS, WIDTH = 7, 12


def tiny_unet(seed=0):
    network = unet(
        seed=seed,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
    )
    # Larger weights than at initialisation, so that text matters.
    with torch.no_grad():
        for name, weights in network.named_parameters():
            if "attn2" in name:
                weights.mul_(6)
    return network


def generators(count, seed=5):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def embeddings(count, seed):
    return torch.randn(count, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def start_of(denoise, count=4, kind="epsilon", alpha_bar=0.01, shape=SHAPE, width=WIDTH, seed=1):
    """A batch whose denoiser is ``denoise(x, conditions)``."""
    generator = torch.Generator().manual_seed(seed)
    empty = torch.randn(1, TOKENS, width, generator=generator)
    return Start(
        noise=torch.randn(count, *shape, generator=generator),
        conditions=TextConditions(torch.randn(count, TOKENS, width, generator=generator)),
        unconditional=TextConditions(empty.expand(count, -1, -1).clone()),
        denoise=denoise,
        alpha_bar=torch.tensor(alpha_bar),
        prediction_type=kind,
        guidance_scale=7.5,
        generators=generators(count),
    )


def rows_of(start, rows):
    """Some samples of a batch as a batch of their own, with fresh generators."""
    fresh = generators(len(start.noise))
    return Start(
        noise=start.noise[rows],
        conditions=start.conditions[rows],
        unconditional=start.unconditional[rows],
        denoise=start.denoise,
        alpha_bar=start.alpha_bar,
        prediction_type=start.prediction_type,
        guidance_scale=start.guidance_scale,
        generators=[fresh[row] for row in range(len(start.noise))[rows]],
    )


def prediction_of(cond, uncond, scale=7.5, kind="epsilon", alpha_bar=0.3, **fields):
    """A step's record from its two branches."""
    return Prediction(
        **{
            "x_t": torch.zeros_like(cond),
            "alpha_bar": torch.tensor(alpha_bar),
            "time": 0.5,
            "output": combine(cond, uncond, scale),
            "output_cond": cond,
            "output_uncond": uncond,
            "conditions": TextConditions(embeddings(len(cond), 3)),
            "guidance_scale": scale,
            "prediction_type": kind,
            "denoise": lambda x, y: cond,
            **fields,
        }
    )
