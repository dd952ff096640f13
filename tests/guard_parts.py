"""Indexes, guidances and calls of every family for the tests of the guard."""

from contextlib import contextmanager

import pytest
import tiny_pipelines
import torch

import memfree
from memfree.guidance import ConstantThreshold, NormalizedL2, SteadyAMG, calibrate
from memfree.retrieval import LatentFeatures, ReferenceIndex

SHAPE = (3, tiny_pipelines.PIXELS, tiny_pipelines.PIXELS)
PROMPTS = ["a cat", "two dogs"]
FAMILIES = (
    "stable_diffusion",
    "stable_diffusion_xl",
    "stable_diffusion_img2img",
    "stable_diffusion_xl_img2img",
    "pixart",
    "pixart_sigma",
    "stable_diffusion_3",
    "stable_diffusion_3_img2img",
    "stable_diffusion_inpaint",
    "stable_diffusion_inpaint_9",
    "stable_diffusion_xl_inpaint",
    "stable_diffusion_xl_inpaint_9",
    "stable_diffusion_controlnet",
    "stable_diffusion_controlnet_img2img",
    "stable_diffusion_controlnet_inpaint",
    "stable_diffusion_xl_controlnet",
    "stable_diffusion_xl_controlnet_img2img",
    "stable_diffusion_xl_controlnet_inpaint",
    "latent_consistency",
    "latent_consistency_img2img",
)
NEVER, ALWAYS = 1.0, -99.0
"""Thresholds of σ = −nL2 that no sample and every sample is above."""


@contextmanager
def refused(words):
    """What is refused in one line with these words, a regular expression."""
    with pytest.raises(ValueError, match=words) as caught:
        yield
    assert "\n" not in str(caught.value)


def random_images(count, seed):
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def make_index(images=None, captions=True):
    """60 references, the first ones given, calibrated on 500 random images."""
    references = random_images(60, 1)
    if images is not None:
        references[: len(images)] = images
    texts = [f"picture {i}" for i in range(60)] if captions else None
    index = ReferenceIndex.build(
        references, captions=texts, keys=[f"img{i}" for i in range(60)], groups=range(60)
    )
    calibrate(index, NormalizedL2(), random_images(500, 2))
    return index


def amg(index, threshold=ALWAYS, **strengths):
    strengths = strengths or {"c1": 0.01, "c2": 0.01, "c3": 30.0, "max_displacement": 0.5}
    return SteadyAMG(index, NormalizedL2(), ConstantThreshold(threshold), **strengths)


class ActiveRows:
    """A guidance that adds a fixed change to x̂_0 of some rows."""

    def __init__(self, rows, change=0.3, first_step=0):
        self.rows = torch.tensor(rows)
        self.change = change
        self.first_step = first_step
        self.seen = []

    def __call__(self, prediction):
        self.seen.append(prediction)
        if prediction.step < self.first_step:
            return prediction
        moved = torch.full_like(prediction.x_t[self.rows], self.change, dtype=torch.float32)
        active = torch.zeros(len(prediction.x_t), dtype=torch.bool)
        active[self.rows] = True
        return prediction.with_clean_change(moved, self.rows).activated(active)


def noise(count=2):
    return [torch.Generator().manual_seed(i) for i in range(count)]


def options(name, count=2):
    """The call of a family on ``count`` images, from fixed noise."""
    call = {"num_inference_steps": 4, "output_type": "pt", "generator": noise(count)}
    if "img2img" in name or "inpaint" in name:
        call |= {"image": random_images(count, 3) / 2 + 0.5, "strength": 0.8}
    if "inpaint" in name:
        mask = torch.zeros(count, 1, *SHAPE[1:])
        mask[:, :, :, SHAPE[2] // 2 :] = 1  # the right half is drawn
        call |= {"mask_image": mask}
        # Otherwise the size of the training images that the denoiser's configuration tells.
        call |= {"height": SHAPE[1], "width": SHAPE[2]}
    if "controlnet" in name:
        where = "control_image" if "image" in call else "image"
        call |= {where: random_images(count, 4) / 2 + 0.5}
    if name == "latent_consistency_img2img":
        call |= {"num_inference_steps": 5}  # of which strength leaves four
    if "pixart" in name:
        call |= {
            "use_resolution_binning": False,
            "clean_caption": False,
            "height": SHAPE[1],
            "width": SHAPE[2],
        }
    if "stable_diffusion_3" in name:
        call |= {"max_sequence_length": 16}
    return call


def state(pipe):
    """All that the guard may have touched."""
    hooks = [
        (len(part._forward_hooks), len(part._forward_pre_hooks))
        for part in (pipe.unet, pipe.vae, pipe.text_encoder)
    ]
    return type(pipe), dict(vars(pipe)).keys(), hooks, dict(pipe.scheduler.config)


def drawn(pipe, count=2, **extra):
    call = {**options("stable_diffusion", count), **extra}
    return pipe(call.pop("prompt", PROMPTS), **call).images


def copies(pipe, count=20, guidance=None, **call):
    """Verdicts "copy" of a pipeline that draws images of its own index: (unguarded, guarded).

    What is nearer to an image of the index than nL2 0.05 is a copy.

    Args:
        pipe: the pipeline.
        count: images.
        guidance: makes the guidance of an index; None: the guard's own.
        call: further arguments of the call.
    """
    call = {"num_inference_steps": 10, "output_type": "pt", **call}

    def draw():
        with torch.random.fork_rng([]):  # some steps draw from torch's own generator
            torch.manual_seed(0)
            return pipe(["a cat"] * count, generator=noise(count), **call).images

    index = make_index(2 * draw() - 1)
    index.calibrations["nl2-k50-a0.5"]["sigmas"] = [-0.05] * 500
    left = []
    for guidances in ([], None if guidance is None else guidance(index)):
        with memfree.guard(pipe, index, guidances) as report:
            draw()
        left.append(len(report.copies))
    return tuple(left)


def make_latents(vae=None, captions=True, size=SHAPE[1]):
    """References of multiplicity guidance, of tiny_pipelines' autoencoder; 5 of 60 are repeated."""
    images = torch.rand(60, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    counts = torch.ones(60, dtype=torch.int64)
    counts[:5] = 50
    return ReferenceIndex.build(
        images,
        LatentFeatures(vae or tiny_pipelines.autoencoder()),
        captions=PROMPTS * 30 if captions else None,
        counts=counts,
        groups=range(60),
    )
