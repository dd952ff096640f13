"""Means over training seeds against scipy, the verdict on the goal, tables and pictures."""

import html
import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from scipy import stats

from memfree.evaluation.intervals import Interval
from memfree.evaluation.metrics import metric, write_metrics
from memfree.folders.manifest import write_manifest
from memfree.study import curves
from memfree.study.curves import write_curves
from memfree.study.grid import Grid
from memfree.study.metrics_shown import (
    SHOWN,
    Measured,
    amount_over_seeds,
    over_seeds,
    rate_over_seeds,
    upper_limit,
    upper_limit_of_rates,
)
from memfree.study.page import (
    Bold,
    ResultTable,
    by_metric,
    curve_tables,
    differences,
    figure_text,
    mean_tables,
    printed,
    write_report,
)
from memfree.study.plan import GridPlan
from memfree.study.results import by_key, gather, ladder_metrics
from memfree.study.summary import Summary


def test_interval_over_seeds_is_students():
    values = [0.1, 0.4, 0.25]
    found = over_seeds(values)
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    one_sided = np.mean(values) + stats.t.ppf(0.95, 2) * stats.sem(values)
    assert upper_limit(values) == pytest.approx(one_sided)
    assert over_seeds([0.3]).low is None and math.isnan(upper_limit([0.3]))


def test_one_seed_has_no_interval_however_many_samples():
    one = [Measured(0.3, 10_000)]
    assert rate_over_seeds(one) == Interval(0.3)
    assert math.isnan(upper_limit_of_rates(one, [Measured(0.5, 10_000)]))
    values = {("class", 64, "unguided", "copies"): {7: one[0]}}
    (table,) = [table for table in mean_tables(values) if "repeated images" in table.heading]
    assert "one training seed" in table.heading and table.rows == [["unguided", "30.00"]]


@pytest.mark.parametrize(
    ("mean", "spread"), [(0.4, 0.05), (0.4, 0.3), (0.02, 0.02), (0.05, 0.1), (0.98, 0.02)]
)
def test_rates_over_seeds_cover_other_trainings(mean, spread):
    """Three trainings whose true rates differ; 500 samples each."""
    generator = np.random.default_rng(0)
    precision, inside = 1 / spread - 1, 0
    for _ in range(400):
        rates = generator.beta(mean * precision, (1 - mean) * precision, 3)
        found = rate_over_seeds([Measured(generator.binomial(500, p) / 500, 500) for p in rates])
        inside += found.low <= mean <= found.high
    assert inside / 400 >= 0.9


@pytest.mark.parametrize("mean", [0.2, 1.0, 5.0])
def test_numbers_of_copies_over_seeds_cover_other_trainings(mean):
    """Ten images a training; seeds without a copy have no interval."""
    generator = np.random.default_rng(1)
    found = [
        amount_over_seeds([Measured(generator.poisson(mean) / 10, 10) for _ in range(3)])
        for _ in range(400)
    ]
    inside = [one.low <= mean / 10 <= one.high for one in found if one.low is not None]
    assert len(inside) >= 100 and np.mean(inside) >= 0.9
    assert amount_over_seeds([Measured(0.0, 10)] * 3) == Interval(0.0)


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
    plan = GridPlan("oracle", finished, {"both": {}}, [Grid(["class"], [64])], [1, 2, 3, 9])
    rows = gather(plan)
    assert len(rows) == 12 and {row["training_seed"] for row in rows} == {1, 2, 3}
    assert len(gather(replace(plan, training_seeds=[2]))) == 4
    folders = {(row["subject"], row["training_seed"]): row["folder"] for row in rows}
    assert folders["both", 2] == "class-x64-seed2/samples/both"
    assert folders["oracle_steps", 2] == "class-x64-seed2/evaluation-oracle"
    values = by_key(rows)
    (compared,) = differences(values)
    text = "\n".join(table.as_markdown() for table in mean_tables(values))
    assert "### class, repeated images × 64 (training seeds: 3)" in text
    assert "| both | 0.20 (0.00–0.45) | 1.30 (1.30–1.30) |" in text
    verdicts = compared.as_markdown()
    row = verdicts.splitlines()[-1]
    assert row.startswith("| class × 64 | steps | **-0.40 (≤ -0.1")  # counts keep it from −0.40
    assert row.endswith("|  |  | +30.00 (≤ +30.00) |  |")
    assert "it (1 of 2)" in verdicts.replace("\n", " ") and verdicts in text
    without = {key: value for key, value in values.items() if not key[2].startswith("oracle")}
    assert differences(without) == []
    assert by_metric(values) == [], "one model: its own table says all"


def test_two_ladders_and_a_model_named_like_one_keep_their_figures(tmp_path):
    """Each conditioning copies as often as its number says, on each of two ladders."""
    grids = [
        Grid(["unconditional", "class"], ladder=[[1, 4], [1, 8]]),
        Grid(["class"], factor=[1, 4], model=["my-ladder"]),
    ]
    models = {"my-ladder": {}}
    plan = GridPlan("trial", tmp_path, {"unguided": {}}, grids, [1, 2], models=models)
    cells = plan.cells()
    for number, cell in enumerate(cells):
        folder = plan.evaluation(cell)
        folder.mkdir(parents=True)
        figures = [metric("copies", "unguided", number / 100, 100)]
        for factor in cell.factors if len(cell.factors) > 1 else ():
            figures.append(
                metric(f"copies_per_image_of_factor_{factor}", "unguided", 10 * number + factor, 9)
            )
        write_metrics(folder / "metrics.json", figures)
        if len(cell.factors) > 1:
            near = {"nearest_multiplicity": [*cell.factors] * 10, "copy": [True, False, True] * 6}
            near["copy"] += [True, False]
            near["nearest_key"] = [str(place % 6) for place in range(20)]
            table = {"subject": ["unguided"] * 20, **near}
            pq.write_table(pa.table(table), folder / "per_sample.parquet")
        write_manifest(folder, "evaluation")
    rows = gather(plan)
    values = by_key(rows)
    copies = [len(seeds) for key, seeds in values.items() if key[3] == "copies"]
    assert copies == [2] * 6, "no model's figures hide another's"
    summary = Summary("trial", values, rows, 0, len(cells))
    tables = {table.heading: table for table in curve_tables(summary)}
    found = tables["Copies of an image against its repetitions"].rows
    expected = [
        [f"{conditioning}, ladder 1-{top}", str(factor), 10 * number + factor + 10 * 6 / 2]
        for number, (conditioning, top) in enumerate(
            itertools.product(("unconditional", "class"), (4, 8))
        )
        for factor in (1, top)
    ]
    assert [[row[0], row[2], float(row[3].split()[0])] for row in found] == expected
    fitted = {row[0] for row in tables["Logistic fit in log2 of the factor"].rows}
    assert "class, my-ladder" in fitted and len(fitted) == 5
    assert write_curves(tmp_path / "trial.png", summary)
    alone = gather(replace(plan, grids=[Grid(ladder=[[1, 4]])], training_seeds=[1]))
    assert {row["label"] for row in alone} == {"unconditional, ladder"}


def test_samples_near_one_image_say_nothing_of_others(tmp_path):
    table = {
        "subject": ["none"] * 41,
        "nearest_multiplicity": [4] * 20 + [8] * 20 + [16],
        "nearest_key": ["a"] * 20 + ["b", "c"] * 10 + ["d"],
        "copy": [True] * 40 + [False],
    }
    pq.write_table(pa.table(table), tmp_path / "per_sample.parquet")
    one, two, alone = ladder_metrics(tmp_path / "per_sample.parquet", [4, 8, 16])
    assert one.value == 1 and one.low is None and one.high is None and one.count == 20
    assert two.low is not None and two.low < 0.5
    assert alone.value == 0 and alone.high > 0.7


def test_tables_stand_alike_in_markdown_and_on_the_page(tmp_path):
    values = {
        ("class", 4, "both", "copies"): {1: Measured(0.001, 1000), 2: Measured(0.001, 1000)},
        ("class", 4, "oracle_steps", "copies"): {1: Measured(0.02, 1000), 2: Measured(0.02, 1000)},
    }
    write_report(tmp_path, Summary("trial", values, [], 1, 3), {})
    text = (tmp_path / "trial.md").read_text()
    page = (tmp_path / "trial.html").read_text()
    assert text.startswith("1 of 3 cells are not finished")
    bold = re.findall(r"\*\*(.+?)\*\*", text)
    assert bold and bold == [html.unescape(one) for one in re.findall("<b>(.+?)</b>", page)]
    cells = [one for line in text.splitlines() for one in line.strip("| ").split(" | ")]
    for cell in re.findall("<td>([^<]+)</td>", page):
        assert html.unescape(cell) in cells


def test_a_figure_stands_with_its_interval():
    assert figure_text(Interval(0.12345), ".1f", 100) == "12.3"
    assert figure_text(Interval(0.5, 0.25, 1.0), ".1f", 100) == "50.0 (25.0–100.0)"
    assert figure_text(Interval(123.4, 100.0, 1234.0), "#.3g") == "123 (100–1.23e+03)"
    table = ResultTable("One", ["", "b"], [["x", Bold("1")]], "word " * 40)
    lines = table.as_markdown().splitlines()
    assert lines[0] == "### One" and lines[-3:] == ["|  | b |", "|---|---|", "| x | **1** |"]
    assert max(map(len, lines)) <= 100 and " ".join(lines[2:-4]) == ("word " * 40).strip()


def test_the_picture_beside_the_oracle_has_a_row_a_model(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curves, "save", lambda figure, path: drawn.append(figure))
    subjects = ("unguided", "both", "oracle_steps", "oracle_epochs", "heldout")
    values = {
        (label, factor, subject, name): {1: Measured(0.25, 100), 2: Measured(0.75, 100)}
        for label in ("unconditional", "class")
        for factor in (1, 4, 64)
        for subject in (subjects if factor > 1 else (*subjects[:2], "heldout"))
        for name in curves.PANELS
    }
    values["class, ladder", 0, "oracle_steps", "copies"] = {1: Measured(0.5, 100)}
    assert curves.write_against_oracle(tmp_path / "x.png", values)
    (figure,) = drawn
    assert len(figure.axes) == 2 * 3
    for number, axes in enumerate(figure.axes):
        lines = {line.get_label(): line for line in axes.get_lines() if line.get_label()[0] != "_"}
        assert [*lines] == ["unguided", "both", "oracle, equal steps", "oracle, equal epochs"]
        mean = 0.5 if number % 3 == 2 else 50
        assert lines["both"].get_xydata().tolist() == [[1, mean], [4, mean], [64, mean]]
        assert lines["oracle, equal steps"].get_xydata().tolist() == [[4, mean], [64, mean]]
    without = {key: value for key, value in values.items() if not key[2].startswith("oracle")}
    assert curves.write_against_oracle(tmp_path / "x.png", without) == ""
    assert len(drawn) == 1


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
    copies, distance = (table.as_markdown() for table in by_metric(values))
    assert copies.splitlines() == [
        "### Copies, %",
        "",
        "|  | unguided | both |",
        "|---|---|---|",
        "| unconditional × 4 | 25.0 | 0.0 |",
        "| class × 64 | 55.0 |  |",
    ]
    assert "| unconditional × 4 | 1234 |  |" in distance and "| class × 64 | 1.00 |" in distance


def test_the_terminal_has_all_means_in_80_columns(capsys):
    known = {1: Measured(0.5, 100)}
    values = {
        (label, 64, subject, name): known
        for label in ("unconditional, 4096 images", "random labels, 4096 images")
        for subject in ("unguided", "oracle_epochs")
        for name in SHOWN
        if name != "class_agreement"
    }
    Console(width=80).print(printed(values))
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.split()[1:] == ["50.0"] * 3 + ["0.500"] * 2 for line in lines) == 4
    assert "EfficientNet" in " ".join(lines) and not any("…" in line for line in lines)
