"""SamplingModule: sample i depends on (seed, i), whatever the batch, the rank and the guidance."""

import lightning.pytorch as pl
import pytest
import torch

from memfree.guidance import GuidanceSettings, Mitigation, NormalizedL2
from memfree.images import from_bytes, to_bytes
from memfree.models import LoadedModel
from memfree.sampling import SampleBatch, SampleIndices, SampleRun, SamplingModule, sample
from memfree.sampling.checks import build_scheduler
from memfree.sampling.module import IndexBatches, share
from memfree.sampling.noise import draw, generators

SHAPE = (1, 4, 4)
STEPS = 10


def loaded(denoiser, scheduler) -> LoadedModel:
    return LoadedModel(denoiser, scheduler, SHAPE, num_classes=3, manifest={})


def batches(module: SamplingModule, count: int, batch_size: int) -> list[SampleBatch]:
    module.on_predict_start()
    with torch.no_grad():
        return [module.predict_step(i) for i in torch.arange(count).split(batch_size)]


def drawn(module: SamplingModule, count: int, batch_size: int) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches(module, count, batch_size)])


def undecided(batch: SampleBatch) -> torch.Tensor:
    """Samples that come so near the gate that rounding may open or close it."""
    near = (batch.trace["sigma"] - batch.trace["lambda"]).abs() < 1e-4
    return torch.bincount(batch.trace["sample"], near.float()) > 0


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpmsolver++-karras", "euler"])
@pytest.mark.parametrize("mitigation", [None, "amg", "both"])
def test_batch_size_changes_nothing(denoiser, trained, index, scheduler, mitigation):
    settings = () if mitigation is None else GuidanceSettings(mitigation=mitigation)
    module = SamplingModule(
        loaded(denoiser, trained),
        build_scheduler(scheduler, trained),
        STEPS,
        seed=5,
        guidance=settings,
        guidance_scale=2.0,
        asked=range(3),
        index=index,
    )
    (whole,) = batches(module, 12, 12)
    parts = drawn(module, 12, 5)
    decided = torch.ones(12, dtype=torch.bool) if mitigation is None else ~undecided(whole)
    assert decided.sum() >= 10
    difference = (whole.images - parts)[decided].abs().max()
    assert difference <= 2 / 255  # 1/255 of the range of 2
    assert whole.images.std() > 0.1


def test_the_pure_function_gives_the_same(denoiser, trained, index):
    scheduler = build_scheduler("ddpm", trained)
    module = SamplingModule(loaded(denoiser, trained), scheduler, STEPS, seed=3, asked=[2, 0])
    batch = module.predict_step(torch.tensor([4, 9, 10]))
    sources = generators(3, [4, 9, 10])
    noise = draw(SHAPE, sources)
    conditions = torch.tensor([2, 0, 2])
    result = sample(denoiser, scheduler, noise, STEPS, conditions=conditions, generators=sources)
    assert torch.equal(batch.images, result.images)
    assert batch.conditions == conditions.tolist()
    assert batch.trace is None


def test_seeds_and_indices_give_different_samples(denoiser, trained):
    def noise_of(seed, i):
        return draw(SHAPE, generators(seed, [i]))

    assert not torch.equal(noise_of(0, 0), noise_of(0, 1))
    assert not torch.equal(noise_of(0, 0), noise_of(1, 0))


def test_the_observer_changes_no_bit(denoiser, trained, index):
    scheduler = build_scheduler("ddim", trained)
    plain = SamplingModule(loaded(denoiser, trained), scheduler, STEPS, seed=0, asked=range(3))
    watched = SamplingModule(
        loaded(denoiser, trained),
        scheduler,
        STEPS,
        seed=0,
        asked=range(3),
        guidance=GuidanceSettings(),
        index=index,
    )
    assert torch.equal(drawn(plain, 6, 3), drawn(watched, 6, 3))
    batch = watched.predict_step(torch.arange(3))
    assert batch.trace["sigma"].isfinite().all()
    assert len(batch.trace["sigma"]) == 3 * STEPS
    assert not batch.trace["active"].any()


def test_guided_samples_are_steered(denoiser, trained, index):
    """The denoiser copies; AMG moves its samples off the copied images."""
    arguments = (loaded(denoiser, trained), build_scheduler("ddim", trained), STEPS, 0)
    plain = drawn(SamplingModule(*arguments), 8, 8)
    settings = GuidanceSettings(mitigation="amg")
    guided = drawn(SamplingModule(*arguments, guidance=settings, index=index), 8, 8)
    threshold = settings.end_threshold(index)
    assert (NormalizedL2()(index, plain).sigma > threshold).all()
    assert (NormalizedL2()(index, guided).sigma <= threshold).all()


def test_settings_need_an_index(denoiser, trained):
    with pytest.raises(ValueError, match="need a reference index"):
        SamplingModule(
            loaded(denoiser, trained), trained, 2, 0, guidance=GuidanceSettings(mitigation="amg")
        )


@pytest.mark.parametrize(("count", "ranks"), [(10, 3), (2, 3), (0, 2), (7, 1)])
def test_ranks_share_without_gap_or_overlap(count, ranks):
    missing = [3 * i + 1 for i in range(count)]
    parts = [share(missing, rank, ranks).tolist() for rank in range(ranks)]
    assert sum(parts, []) == missing
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_index_batches():
    assert [b.tolist() for b in IndexBatches(torch.arange(5), 2)] == [[0, 1], [2, 3], [4]]
    assert len(IndexBatches(torch.arange(0), 2)) == 0


def test_trainer_predicts_missing_samples_only(denoiser, trained, tmp_path, monkeypatch):
    run = SampleRun(tmp_path / "out", {}, count=9)
    run.begin()
    monkeypatch.setattr(SampleRun, "missing", lambda self: [1, 4, 5, 8])
    module = SamplingModule(loaded(denoiser, trained), build_scheduler("ddim", trained), 2, 0)
    trainer = pl.Trainer(
        accelerator="cpu",
        inference_mode=False,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    batches = trainer.predict(module, datamodule=SampleIndices(run, batch_size=3))
    assert torch.cat([batch.index for batch in batches]).tolist() == [1, 4, 5, 8]
    run.release()


class Bright(Mitigation):
    """Accepts images that are lighter than grey."""

    def accept(self, images):
        return images.mean(dim=(1, 2, 3)) > 0


def redrawn_by_hand(denoiser, scheduler, accept, count, budget):
    """One sample at a time: the first attempt that is accepted as saved, or the last one."""
    images = []
    for i in range(count):
        for attempt in range(budget):
            sources = generators(3, [i], attempt)
            drawn = sample(denoiser, scheduler, draw(SHAPE, sources), STEPS, generators=sources)
            if accept(from_bytes(to_bytes(drawn.images))).item():
                break
        images.append(drawn.images)
    return torch.cat(images)


def test_what_a_mitigation_does_not_accept_is_drawn_again(denoiser, trained):
    scheduler = build_scheduler("ddim", trained)
    module = SamplingModule(loaded(denoiser, trained), scheduler, STEPS, 3, Bright(), budget=3)
    images = drawn(module, 12, 12)
    expected = redrawn_by_hand(denoiser, scheduler, Bright().accept, 12, 3)
    assert torch.allclose(images, expected, atol=1e-4)
    plain = drawn(SamplingModule(loaded(denoiser, trained), scheduler, STEPS, 3), 12, 12)
    kept = Bright().accept(plain)
    assert 0 < kept.sum() < 12
    assert torch.equal((images == plain).flatten(1).all(dim=1), kept)


@pytest.mark.parametrize("budget", [1, 3])
def test_rejection_draws_again_what_is_above_the_threshold(denoiser, trained, index, budget):
    scheduler = build_scheduler("ddim", trained)
    settings = GuidanceSettings("reject", budget=budget)
    level = settings.end_threshold(index)
    module = SamplingModule(
        loaded(denoiser, trained), scheduler, STEPS, 3, settings, asked=None, index=index
    )
    (batch,) = batches(module, 6, 6)
    expected = redrawn_by_hand(
        denoiser, scheduler, lambda x: NormalizedL2()(index, x).sigma <= level, 6, budget
    )
    assert torch.allclose(batch.images, expected, atol=1e-4)
    # The trace is that of the attempt that was kept.
    assert len(batch.trace["sigma"]) == 6 * STEPS
    last = batch.trace["sigma"].reshape(STEPS, 6)[-1]
    assert torch.allclose(last, NormalizedL2()(index, batch.images).sigma, atol=1e-3)
