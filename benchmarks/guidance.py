"""Guided over unguided sampling with a CIFAR-size U-Net, by the share of active samples.

Unconditional with G_sim; class-conditional with all three guidances and a nearest image of another
class for every active sample, so that eq. 16 always costs a call of the denoiser.

``python benchmarks/guidance.py`` writes benchmarks/results/guidance.json.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from detection import pictures
from diffusers import DDPMScheduler, UNet2DModel
from harness import Records, compared, interleaved, measure
from torch import Tensor

from memfree.guidance import (
    ConstantThreshold,
    Guidance,
    MultiplicityGuidance,
    NormalizedL2,
    SteadyAMG,
)
from memfree.guidance.observer import Detection
from memfree.guidance.prediction import Prediction
from memfree.retrieval import ReferenceIndex
from memfree.sampling import sample
from memfree.sampling.noise import draw, generators


class Size(NamedTuple):
    """How much is measured."""

    rows: int
    """References."""
    batch: int
    """Samples drawn together."""
    steps: int
    channels: tuple[int, ...]
    """Of the U-Net's resolutions."""
    repetitions: int


FULL = Size(50_000, 16, 10, (128, 256, 256, 256), 5)
TINY = Size(60, 2, 5, (8, 8, 8, 8), 2)
SHARES = (0.0, 0.1, 1.0)
LIMIT = 1.10
"""Goal for the ratio at 10 % active samples."""
ASKED, NEAREST = 0, 1
"""The class that is asked for, and that of all references."""


CLASSES = 3
"""Labels of the class-conditional network; the last stands for no class, as in our own models."""


def network(channels: tuple[int, ...], classes: int | None = None) -> UNet2DModel:
    """The U-Net of DDPM on CIFAR-10, 35.7 M weights, untrained: time does not depend on them."""
    torch.manual_seed(0)
    net: Any = UNet2DModel(
        sample_size=32,
        num_class_embeds=classes,
        block_out_channels=channels,
        norm_num_groups=min(32, *channels),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    return net.eval().requires_grad_(False)


class ForcedGuidance(SteadyAMG):
    """AMG whose gate opens for a share of the samples, exactly so on average over the steps."""

    share = 0.0
    step = 0
    count = 0
    """Samples that it opens for at this step."""

    def __call__(self, prediction: Prediction) -> Prediction:
        """Guide the first so many rows."""
        each = self.share * len(prediction.x_t)
        self.count = int((self.step + 1) * each) - int(self.step * each)
        self.step += 1
        return super().__call__(prediction)

    def opens(self, detection: Detection, records: Tensor) -> Tensor:
        """The first so many rows, whatever σ is; AMG may ask more than once a step."""
        return torch.arange(len(records), device=records.device) < self.count


def run(tiny: bool = False) -> Records:
    """Measure; one record a guidance and share (see ``harness.record``)."""
    size = TINY if tiny else FULL
    device = "cuda" if torch.cuda.is_available() else "cpu"
    counts = torch.ones(size.rows, dtype=torch.int64)
    counts[::500] = 64
    references = pictures(size.rows, torch.Generator().manual_seed(0))
    # The class that is asked for has few images: the nearest one is of the other class.
    labels = torch.full((size.rows,), NEAREST)
    labels[: size.batch] = ASKED
    index = ReferenceIndex.build(references, labels=labels, groups=range(size.rows), counts=counts)
    index = index.to(device)
    return [
        *_compare(index, False, SHARES, size),
        *_compare(index, True, (0.1,), size),
    ]


def _compare(
    index: ReferenceIndex, conditional: bool, shares: tuple[float, ...], size: Size
) -> Records:
    kind = "class, scale 3" if conditional else "unconditional"
    device = index.vectors.device
    net: Any = network(size.channels, CLASSES if conditional else None).to(device)

    def denoiser(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        if not conditional:
            return net(x, t).sample
        asked = torch.full((len(x),), CLASSES - 1, device=device) if y is None else y
        return net(x, t, class_labels=asked).sample

    def draw_batch(guidance: list[Guidance]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            sources = generators(0, range(size.batch))
            return sample(
                denoiser,
                DDPMScheduler(),
                draw((3, 32, 32), sources).to(device),
                size.steps,
                guidance,
                conditions=torch.full((size.batch,), ASKED, device=device) if conditional else None,
                guidance_scale=3.0 if conditional else 1.0,
                generators=sources,
            ).images

        return call

    multiplicity = MultiplicityGuidance(index)
    functions = {"unguided": draw_batch([])}
    for share in shares:
        # λ below any σ: eq. 13 and 15 have something to multiply; the override opens the gate.
        amg = ForcedGuidance(
            index,
            NormalizedL2(),
            ConstantThreshold(-10.0),
            c1=0.01,
            c2=0.01,
            c3=100.0,
            max_displacement=0.5,
        )
        amg.share = share
        functions[f"amg, {share:.0%} active"] = draw_batch([amg])
        functions[f"both, {share:.0%} active"] = draw_batch([multiplicity, amg])
    timings = interleaved(functions, size.repetitions)
    weights = sum(weight.numel() for weight in net.parameters())
    return [
        compared(
            f"{kind}: {name} / unguided",
            timings,
            name,
            "unguided",
            parameters=weights,
            batch=size.batch,
            steps=size.steps,
            references=size.rows,
            limit=LIMIT if ", 10%" in name else None,
        )
        for name in functions
        if name != "unguided"
    ]


if __name__ == "__main__":
    measure("guidance", run)
