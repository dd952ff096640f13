"""Reject and resample draws again exactly what is rejected, within its budget."""

import torch

from memfree.sampling.loop import Result
from memfree.sampling.module import redraw


def drawn(calls):
    def draw(positions, attempt):
        calls.append((positions.tolist(), attempt))
        images = (10 * positions + attempt).float().view(-1, 1, 1, 1)
        rows = positions.repeat(2)  # two steps
        trace = {
            "sample": torch.arange(len(positions)).repeat(2),
            "sigma": (10 * rows + attempt).float(),
        }
        return Result(images, trace)

    return draw


def test_only_rejected_samples_are_drawn_again():
    calls = []
    accepted_at = torch.tensor([0, 2, 1, 0])

    def rejected(images):
        value = images.flatten().long()
        return value % 10 < accepted_at[value // 10]

    result = redraw(drawn(calls), rejected, 4, budget=5)
    assert calls == [([0, 1, 2, 3], 0), ([1, 2], 1), ([1], 2)]
    assert result.images.flatten().tolist() == [0, 12, 21, 30]
    assert result.trace["sigma"].tolist() == [0, 12, 21, 30] * 2
    assert result.trace["sample"].tolist() == [0, 1, 2, 3] * 2


def test_the_budget_ends_it_and_the_last_draw_is_kept():
    calls = []
    result = redraw(drawn(calls), lambda images: torch.ones(len(images), dtype=bool), 2, budget=3)
    assert [attempt for _, attempt in calls] == [0, 1, 2]
    assert result.images.flatten().tolist() == [2, 12]
