"""SamplingModule: draws batches in Lightning's predict loop and redraws rejected samples."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor

from memfree.conditions import TextConditions
from memfree.diffusion_math import alpha_bar_at
from memfree.folders.lock import ORPHAN_WAIT
from memfree.guidance import (
    MITIGATIONS,
    Guidance,
    GuidanceSettings,
    Guided,
    Mitigation,
    Start,
)
from memfree.guidance.baselines import TextTools
from memfree.guidance.mitigation import attempts
from memfree.images import from_bytes, to_bytes
from memfree.models import LoadedModel
from memfree.retrieval import ReferenceIndex
from memfree.sampling.loop import Result, sample
from memfree.sampling.noise import draw, generators
from memfree.sampling.sample_run import SampleRun


def redraw(
    draw: Callable[[Tensor, int], Result],
    rejected: Callable[[Tensor], Tensor],
    count: int,
    budget: int,
) -> Result:
    """Draw a batch, then redraw what is ``rejected`` until nothing is or the budget is spent.

    ``draw``: (positions (b,) in the batch, attempt) → samples. ``budget`` counts the first draw.
    """
    result: Result

    def still_rejected(positions: Tensor) -> Tensor:
        return rejected(result.images[positions]).cpu()

    for attempt, positions in attempts(count, budget, still_rejected):
        again = draw(positions, attempt)
        if attempt == 0:
            result = again
            continue
        result.images[positions] = again.images
        if result.trace is not None and again.trace is not None:
            for name, column in result.trace.items():  # rows are step by step
                if name != "sample":
                    rows = again.trace[name].reshape(-1, len(positions))
                    column.reshape(-1, count)[:, positions] = rows
    return result


def sample_text(
    model: LoadedModel,
    mitigation: Mitigation,
    prompts: Sequence[str],
    noise: Tensor,
    scheduler: Any,
    steps: int,
    guidance_scale: float,
    generators: list[torch.Generator],
    one_call: bool = True,
) -> Result:
    """Draw one image per prompt (B, 3, H, W), about in [−1, 1], through a mitigation's stages.

    The caller applies ``accept``. ``generators``, one per sample, supply all random numbers.
    """
    scale = mitigation.guidance_scale(guidance_scale)
    conditions = model.encode(mitigation.prompts(prompts, generators))
    unconditional = model.encode([""])
    first = copy.deepcopy(scheduler)
    first.set_timesteps(steps, device=noise.device)
    t = first.timesteps[0]

    def denoise(x: Tensor, y: TextConditions) -> Tensor:
        return model.denoiser(first.scale_model_input(x * first.init_noise_sigma, t), t, y)

    start = Start(
        noise=noise,
        conditions=conditions,
        unconditional=unconditional.expand(len(noise)),
        denoise=denoise,
        alpha_bar=alpha_bar_at(first, t, 0).to(noise.device),
        prediction_type=scheduler.config.prediction_type,
        guidance_scale=scale,
        generators=generators,
    )
    start = replace(start, conditions=mitigation.embedding(start))
    noise = mitigation.initial_noise(start)

    guidances = mitigation.guidances()
    with mitigation.around(model.pipe.unet):
        result = sample(
            model.denoiser,
            scheduler,
            noise,
            steps,
            guidance=guidances or None,
            conditions=start.conditions,
            guidance_scale=scale,
            trace=bool(guidances),
            generators=generators,
            decode=model.decode_estimate,
            encode=model.encode,
            # As it is saved: clipped at white and black.
            decode_last=lambda latents: model.decode(latents).clamp(-1, 1),
            one_call=one_call,
        )
    with torch.no_grad():
        return Result(model.decode(result.images), result.trace)


@dataclass
class SampleBatch:
    """Finished samples on the CPU."""

    index: Tensor  # sample indices, (B,) int64
    images: Tensor  # (B, C, H, W) float32 in [-1, 1], up to overshoot
    conditions: list[int] | list[str] | None  # label or prompt of each; None without
    trace: dict[str, Tensor] | None  # columns with a row per sample and step; None without guidance
    seconds: float  # wall time of the batch


class SamplingModule(LightningModule):
    """Draw samples by index; sample i depends only on (seed, i) and the settings.

    Use it with ``Trainer(inference_mode=False)``: guidance needs gradients.

    Args:
        model: denoiser, and for text-to-image the pipeline around it.
        scheduler: a diffusers scheduler.
        guidance: guidances in order (none: no trace), a mitigation, or settings that build one for
            ``index``. A model without text runs only the stages ``guidances`` and ``accept``.
        guidance_scale: classifier-free guidance scale s_0; 1 = the plain conditional model.
        asked: labels or prompts; sample i has ``asked[i % len(asked)]``; None = unconditional.
        index: reference index of the guidances, moved to the denoiser's device.
        latents: references for multiplicity guidance of a text-to-image model.
        budget: maximum draws of a sample that the mitigation rejects; settings have their own.
        one_call: as in ``sample``.
    """

    def __init__(
        self,
        model: LoadedModel,
        scheduler: Any,
        steps: int,
        seed: int,
        guidance: Sequence[Guidance] | Mitigation | GuidanceSettings = (),
        guidance_scale: float = 1.0,
        asked: Sequence[int] | Sequence[str] | None = None,
        index: ReferenceIndex | None = None,
        latents: ReferenceIndex | None = None,
        budget: int = 10,
        one_call: bool = True,
    ) -> None:
        super().__init__()
        self.denoiser = model.denoiser
        self.model = model
        self.scheduler = scheduler
        self.steps = steps
        self.seed = seed
        self.settings = guidance if isinstance(guidance, GuidanceSettings) else None
        self.budget = budget if self.settings is None else int(self.settings.budget)
        given = () if isinstance(guidance, GuidanceSettings) else guidance
        self.mitigation = given if isinstance(given, Mitigation) else Guided(given)
        named = self.settings is not None and self.settings.mitigation in MITIGATIONS
        if named and index is None and model.pipe is None:
            raise ValueError("guidance settings need a reference index")
        self.guidance_scale = guidance_scale
        self.asked = None if asked is None else list(asked)
        self.index = index
        self.latents = latents
        self.one_call = one_call

    def on_predict_start(self) -> None:
        """Move references and model to the device, and build the mitigation there."""
        for index in (self.index, self.latents):
            if index is not None:
                index.to(self.device)
        self.model.to(self.device)
        if self.settings is None:
            return
        if self.model.pipe is None:
            self.mitigation = self.settings.for_pixels(self.index)
            return
        tools = TextTools.of(self.model.pipe.tokenizer, self.index)
        self.mitigation = self.settings.for_text(self.index, tools, self.latents)

    def asked_of(self, index: Tensor) -> list[int] | list[str] | None:
        """Labels or prompts of samples ``index`` (B,); None for an unconditional run."""
        if self.asked is None:
            return None
        return [self.asked[i % len(self.asked)] for i in index.tolist()]  # type: ignore[return-value]

    def predict_step(self, batch: Tensor, batch_idx: int = 0) -> SampleBatch:
        """Draw the samples with the indices ``batch``, (B,) int64."""
        start = time.perf_counter()
        conditions = self.asked_of(batch)

        def draw_attempt(positions: Tensor, attempt: int) -> Result:
            # One generator per sample, for its initial noise and then for the steps.
            sources = generators(self.seed, batch.cpu()[positions].tolist(), attempt)
            own: Any = conditions and [conditions[i] for i in positions.tolist()]
            shared: dict[str, Any] = {
                "noise": draw(self.model.noise_shape, sources).to(self.device),
                "scheduler": self.scheduler,
                "steps": self.steps,
                "guidance_scale": self.guidance_scale,
                "generators": sources,
                "one_call": self.one_call,
            }
            if self.model.pipe is not None:
                return sample_text(self.model, self.mitigation, own, **shared)
            guidances = self.mitigation.guidances()
            return sample(
                self.denoiser,
                guidance=guidances or None,
                conditions=None if own is None else torch.tensor(own, device=self.device),
                trace=bool(guidances),
                **shared,
            )

        result = redraw(draw_attempt, self._rejected, len(batch), self.budget)
        trace = result.trace
        return SampleBatch(
            index=batch.cpu(),
            images=result.images.detach().float().cpu(),
            conditions=conditions,
            trace=trace and {name: column.detach().cpu() for name, column in trace.items()},
            seconds=time.perf_counter() - start,
        )

    def _rejected(self, images: Tensor) -> Tensor:
        saved = from_bytes(to_bytes(images.float())).to(self.device)
        return ~self.mitigation.accept(saved)


class SampleIndices(LightningDataModule):
    """A run's missing sample indices in batches, a disjoint contiguous range for each rank."""

    def __init__(self, run: SampleRun, batch_size: int) -> None:
        super().__init__()
        # On resumption a rank may have nothing left to do.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.run = run
        self.batch_size = batch_size
        self.missing: list[int] = []

    def setup(self, stage: str) -> None:
        """Lock this rank's shards; rank 0 cleans up and broadcasts what is missing."""
        assert self.trainer is not None
        self.run.lock(self.trainer.global_rank, wait=ORPHAN_WAIT)
        self.trainer.strategy.barrier("all locks are held")
        if self.trainer.is_global_zero:
            self.run.clean_up()
            self.missing = self.run.missing_here()
        self.missing = self.trainer.strategy.broadcast(self.missing)

    def mine(self) -> Tensor:
        """Indices that this rank draws, (n,) int64."""
        assert self.trainer is not None
        return share(self.missing, self.trainer.global_rank, self.trainer.world_size)

    def predict_dataloader(self) -> IndexBatches:
        """This rank's batches."""
        return IndexBatches(self.mine(), self.batch_size)


class IndexBatches:
    """``indices`` (n,) int64 in batches; not a DataLoader, so Lightning adds no sampler."""

    def __init__(self, indices: Tensor, batch_size: int) -> None:
        self.batches = list(indices.split(batch_size)) if len(indices) else []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


def share(indices: Sequence[int], rank: int, ranks: int) -> Tensor:
    """A rank's contiguous part of ``indices``; sizes differ by at most 1."""
    return torch.tensor_split(torch.tensor(indices, dtype=torch.int64), ranks)[rank]
