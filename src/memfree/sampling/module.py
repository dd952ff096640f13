"""Sampling as a Lightning prediction: each step draws the samples whose indices it is given."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor

from memfree.folders.folder_lock import ORPHAN_WAIT
from memfree.guidance import Guidance, GuidanceSettings, Mitigation
from memfree.guidance.baselines import Guided, TextTools
from memfree.models import LoadedModel
from memfree.sampling.loop import Result, sample
from memfree.sampling.noise import draw, generators
from memfree.sampling.png import from_bytes, to_bytes
from memfree.sampling.rejection import redraw
from memfree.sampling.run import SampleRun
from memfree.sampling.text import sample_text

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex


@dataclass
class SampleBatch:
    """Finished samples, on the CPU."""

    index: Tensor
    """Sample indices, (B,) int64."""
    images: Tensor
    """(B, C, H, W) float32 in [-1, 1], up to overshoot."""
    conditions: list[int] | list[str] | None
    """The label or the prompt of each; None without."""
    trace: dict[str, Tensor] | None
    """One row a sample and step, column by column; None without guidance."""
    seconds: float
    """Wall time of the batch."""


class SamplingModule(LightningModule):
    """Draw samples by index; sample i depends on (seed, i) and the settings alone.

    Use it with ``Trainer(inference_mode=False)``: guidance needs gradients.

    Args:
        model: what draws: denoiser, and for text-to-image the pipeline around it.
        scheduler: a diffusers scheduler.
        steps: number of denoising steps.
        seed: seed of the run.
        guidance: guidances, applied in order (none: no trace); a mitigation; or settings, from
            which one is built on the device, for ``index``. A model without text runs the stages
            ``guidances`` and ``accept`` of it alone.
        guidance_scale: classifier-free guidance scale s_0; 1 = the plain conditional model.
        asked: sample i has the label or the prompt ``asked[i % len(asked)]``; None = unconditional.
        index: reference index of the guidances, moved to the device with the denoiser.
        latents: references of multiplicity guidance of a text-to-image model.
        budget: draws of a sample that the mitigation does not accept; settings have their own.
        one_call: both branches of classifier-free guidance in one call of the network; see
            ``sample``.

    Raises:
        ValueError: guidance settings are given without an index.
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
        if self.settings is not None and index is None and model.pipe is None:
            raise ValueError("guidance settings need a reference index")
        self.guidance_scale = guidance_scale
        self.asked = None if asked is None else list(asked)
        self.index = index
        self.latents = latents
        self.one_call = one_call

    def on_predict_start(self) -> None:
        """Move the references to the device of the denoiser, and build the mitigation there."""
        for index in (self.index, self.latents):
            if index is not None:
                index.to(self.device)
        self.model.to(self.device)
        if self.settings is None:
            return
        if self.model.pipe is None:
            assert self.index is not None
            self.mitigation = self.settings.for_pixels(self.index)
            return
        tools = TextTools.of(self.model.pipe.tokenizer, self.index)
        self.mitigation = self.settings.for_text(self.index, tools, self.latents)

    def asked_of(self, index: Tensor) -> list[int] | list[str] | None:
        """Label or prompt of each of the samples ``index`` (B,); None for an unconditional run."""
        if self.asked is None:
            return None
        return [self.asked[i % len(self.asked)] for i in index.tolist()]  # type: ignore[return-value]

    def predict_step(self, batch: Tensor, batch_idx: int = 0) -> SampleBatch:
        """Draw the samples whose indices are in ``batch``, (B,) int64.

        Raises:
            ValueError: the sampler produced NaN or infinite values.
        """
        start = time.perf_counter()
        asked = self.asked_of(batch)

        def draw_attempt(positions: Tensor, attempt: int) -> Result:
            # One generator a sample draws its initial noise and then what the steps need.
            sources = generators(self.seed, batch.cpu()[positions].tolist(), attempt)
            here: Any = None if asked is None else [asked[i] for i in positions.tolist()]
            noise = draw(self.model.noise_shape, sources).to(self.device)
            if self.model.pipe is not None:
                return sample_text(
                    self.model,
                    self.mitigation,
                    here,
                    noise,
                    self.scheduler,
                    self.steps,
                    self.guidance_scale,
                    sources,
                    self.one_call,
                )
            guidances = self.mitigation.guidances()
            return sample(
                self.denoiser,
                self.scheduler,
                noise,
                self.steps,
                guidance=guidances or None,
                conditions=None if here is None else torch.tensor(here, device=self.device),
                guidance_scale=self.guidance_scale,
                trace=bool(guidances),
                generators=sources,
                one_call=self.one_call,
            )

        result = redraw(draw_attempt, self._rejected, len(batch), self.budget)
        images = result.images.detach().float().cpu()
        trace = result.trace
        return SampleBatch(
            index=batch.cpu(),
            images=images,
            conditions=asked,
            trace=trace and {name: column.detach().cpu() for name, column in trace.items()},
            seconds=time.perf_counter() - start,
        )

    def _rejected(self, images: Tensor) -> Tensor:
        """Which images, as they will be saved, the mitigation does not accept, (B,) bool."""
        saved = from_bytes(to_bytes(images.float())).to(self.device)
        return ~self.mitigation.accept(saved)


class SampleIndices(LightningDataModule):
    """The sample indices that are missing, in batches: a contiguous range for each rank.

    No sample is drawn twice and none is left out, however unequal the ranks' counts.

    Args:
        run: the sample folder.
        batch_size: samples drawn together on a device.
    """

    def __init__(self, run: SampleRun, batch_size: int) -> None:
        super().__init__()
        # On resumption a rank may have nothing left to do.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.run = run
        self.batch_size = batch_size
        self.missing: list[int] = []

    def setup(self, stage: str) -> None:
        """Lock this rank's shards; let rank 0 clean up and say what is missing."""
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
        """Batches of this rank."""
        return IndexBatches(self.mine(), self.batch_size)


class IndexBatches:
    """Batches of indices, each (b,) int64; no DataLoader, so Lightning adds no sampler.

    Args:
        indices: (n,) int64.
        batch_size: b of all batches but the last.
    """

    def __init__(self, indices: Tensor, batch_size: int) -> None:
        self.batches = list(indices.split(batch_size)) if len(indices) else []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


def share(indices: Sequence[int], rank: int, ranks: int) -> Tensor:
    """The contiguous part of ``indices`` that falls to ``rank``; sizes differ by at most 1."""
    return torch.tensor_split(torch.tensor(indices, dtype=torch.int64), ranks)[rank]
