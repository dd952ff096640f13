"""The progress line counts samples, their rate, and how many were steered."""

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from memfree.sampling import SampleBatch, SampleIndices
from memfree.sampling.writer import SampleProgress, active_samples


def batch(active):
    """One row a sample and step: ``active`` (steps, samples)."""
    active = torch.tensor(active, dtype=torch.bool)
    steps, count = active.shape
    trace = {"sample": torch.arange(count).repeat(steps), "active": active.flatten()}
    return SampleBatch(torch.arange(count), torch.zeros(count, 1, 2, 2), None, trace, 1.0)


def test_a_sample_active_at_any_step_counts_once():
    assert active_samples(batch([[1, 0, 0], [1, 0, 1]])) == 2
    assert active_samples(batch([[0, 0, 0]])) == 0
    untraced = SampleBatch(torch.arange(2), torch.zeros(2, 1, 2, 2), None, None, 1.0)
    assert active_samples(untraced) == 0


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(terminal):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=120)
    data = SampleIndices(SimpleNamespace(), batch_size=3)
    trainer = SimpleNamespace(is_global_zero=True, global_rank=0, world_size=2, datamodule=data)
    data.trainer = trainer
    data.missing = list(range(12))
    progress = SampleProgress(console=console)
    progress.on_predict_start(trainer, None)
    for number in range(2):
        progress.on_predict_batch_end(trainer, None, batch([[1, 0, 0]]), None, number)
    progress.on_predict_end(trainer, None)
    text = stream.getvalue()
    assert "33% steered by AMG (rank 0 of 2)" in text
    assert ("6/6" if terminal else "6 of 6 samples") in text


def test_without_amg_no_share_is_told():
    progress = SampleProgress(steered=False, console=Console(file=io.StringIO()))
    progress._ranks = 1
    assert progress.text() == "0.0 samples/s"


def test_other_ranks_are_silent():
    stream = io.StringIO()
    trainer = SimpleNamespace(is_global_zero=False)
    progress = SampleProgress(console=Console(file=stream))
    progress.on_predict_start(trainer, None)
    progress.on_predict_batch_end(trainer, None, batch([[1]]), None, 0)
    progress.on_predict_end(trainer, None)
    assert stream.getvalue() == ""
