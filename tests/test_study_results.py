"""Means over training seeds against scipy, and the verdict on the goal."""

import math

import numpy as np
import pytest
from scipy import stats

from memfree.evaluation.metrics import metric, write_metrics
from memfree.manifest import write_manifest
from memfree.study.cells import Cell
from memfree.study.plan import Plan
from memfree.study.results import by_key, gather
from memfree.study.statistics import (
    Measured,
    over_seeds,
    rate_over_seeds,
    upper_limit,
    upper_limit_of_rates,
)
from memfree.study.tables import as_markdown, by_metric, differences


def test_interval_over_seeds_is_students():
    values = [0.1, 0.4, 0.25]
    found = over_seeds(values)
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    one_sided = np.mean(values) + stats.t.ppf(0.95, 2) * stats.sem(values)
    assert upper_limit(values) == pytest.approx(one_sided)
    assert over_seeds([0.3]).low is None and math.isnan(upper_limit([0.3]))


def test_rates_of_zero_keep_the_width_of_their_counts():
    zero = [Measured(0.0, 1000)] * 3
    found = rate_over_seeds(zero)
    expected = stats.binomtest(0, 3000).proportion_ci(0.95, "wilson")
    assert (found.low, found.high) == pytest.approx((0.0, expected.high))
    # Against an oracle at zero too: Newcombe's limit of two pooled rates, one-sided 95 %.
    one_sided = stats.binomtest(0, 3000).proportion_ci(0.90, "wilson").high
    assert upper_limit_of_rates(zero, zero) == pytest.approx(one_sided)
    spread = [Measured(value, 1000) for value in (0.0, 0.1, 0.2)]
    assert upper_limit_of_rates(spread, zero) == pytest.approx(upper_limit([0.0, 0.1, 0.2]))


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
    plan = Plan("oracle", finished, {"both": {}})
    cells = [Cell("class", (64,), seed) for seed in (1, 2, 3)]
    rows = gather(plan, [*cells, Cell("class", (64,), 9)])
    assert len(rows) == 12 and {row["training_seed"] for row in rows} == {1, 2, 3}
    assert len(gather(plan, cells[1:2])) == 4
    folders = {(row["subject"], row["training_seed"]): row["folder"] for row in rows}
    assert folders["both", 2] == "class-x64-seed2/samples/both"
    assert folders["oracle_steps", 2] == "class-x64-seed2/evaluation-oracle"
    values = by_key(rows)
    text = as_markdown(values)
    assert "class, repeated images × 64 (training seeds: 3)" in text
    assert "| both | 0.20 (0.00–0.45) | 1.30 (1.30–1.30) |" in text
    verdicts = differences(values)
    row = verdicts.splitlines()[-1]
    assert row.startswith("| class × 64 | steps | **-0.40 (≤ -0.1")  # counts keep it from −0.40
    assert row.endswith("|  |  | +30.00 (≤ +30.00) |  |")
    assert "in bold: the limit is within it (1 of 2)" in verdicts and verdicts in text
    without = {key: value for key, value in values.items() if not key[2].startswith("oracle")}
    assert differences(without) == ""
    assert by_metric(values) == "", "one model: its own table says all"


def test_means_stand_in_a_table_a_metric():
    def measured(*values):
        return {seed: Measured(value, 100) for seed, value in enumerate(values)}

    values = {
        ("class", 64, "unguided", "copies"): measured(0.5, 0.6),
        ("class", 64, "unguided", "frechet_pixels"): measured(1.0),
        ("unconditional", 4, "unguided", "copies"): measured(0.25),
        ("unconditional", 4, "both", "copies"): measured(0.0),
        ("unconditional", 4, "unguided", "frechet_pixels"): measured(1234.5),
    }
    copies, distance = by_metric(values).split("### ")[1:]
    assert copies.splitlines() == [
        "Copies, %",
        "",
        "|  | unguided | both |",
        "|---|---|---|",
        "| unconditional × 4 | 25.0 | 0.0 |",
        "| class × 64 | 55.0 |  |",
        "",
    ]
    assert "| unconditional × 4 | 1234 |  |" in distance and "| class × 64 | 1.00 |" in distance
