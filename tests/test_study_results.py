"""Means over training seeds against scipy, and the verdict on the goal."""

import math

import numpy as np
import pytest
from scipy import stats

from memfree.evaluation.records import metric, write_metrics
from memfree.manifest import write_manifest
from memfree.study_results import (
    by_key,
    differences,
    gather,
    markdown,
    mean_and_half_width,
    upper_limit,
)


def test_interval_over_seeds_is_students():
    values = [0.1, 0.4, 0.25]
    mean, half = mean_and_half_width(values)
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert mean - half == pytest.approx(low) and mean + half == pytest.approx(high)
    one_sided = np.mean(values) + stats.t.ppf(0.95, 2) * stats.sem(values)
    assert upper_limit(values) == pytest.approx(one_sided)
    assert math.isnan(mean_and_half_width([0.3])[1]) and math.isnan(upper_limit([0.3]))


@pytest.fixture
def finished(tmp_path):
    """Three training seeds: 'both' copies less than the oracle, with a larger distance."""
    for seed in (1, 2, 3):
        folder = tmp_path / f"class-x64-seed{seed}" / "evaluation-oracle"
        folder.mkdir(parents=True)
        write_metrics(
            folder / "metrics.json",
            [
                metric("copies", "both", 0.001 * seed, 1000),
                metric("copies", "oracle_steps", 0.004 + 0.001 * seed, 1000),
                metric("frechet_pixels", "both", 1.3, 1000),
                metric("frechet_pixels", "oracle_steps", 1.0, 1000),
            ],
        )
        write_manifest(folder, "evaluation")
    (tmp_path / "class-x64-seed9" / "evaluation-oracle").mkdir(parents=True)  # unfinished
    return tmp_path


def test_finished_cells_are_gathered_and_compared(finished):
    rows = gather(finished, "oracle")
    assert len(rows) == 12 and {row["training_seed"] for row in rows} == {1, 2, 3}
    values = by_key(rows)
    text = markdown(values)
    assert "class, repeated images × 64 (3 training seeds)" in text
    assert "| both | 0.20 ± 0.25 %" in text
    verdicts = differences(values)
    assert "| -0.40 points | -0.40 points | +0.5 points | within |" in verdicts
    assert "| +30.00 % | +30.00 % | +15.0 % | not within |" in verdicts
