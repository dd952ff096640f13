"""The table of an evaluation on a terminal: whole figures, however many subjects there are."""

import io

import pytest
from rich.console import Console

from memfree.evaluation.metrics import HELDOUT, Metric, MetricTable, print_table


@pytest.mark.parametrize("width", [72, 80, 160])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_no_figure_is_cut(width, count):
    subjects = [f"subject_{number}" for number in range(count)]
    rate = {"false_positive_rate": 0.01}
    metrics = [
        Metric("copies", name, (1 + number) / 40, 0.01, 0.99, 40, rate)
        for number, name in enumerate([*subjects, HELDOUT])
    ]
    console = Console(file=io.StringIO(), width=width, legacy_windows=False)
    print_table(MetricTable(metrics), [*subjects, HELDOUT], console)
    printed = console.file.getvalue()
    for number, name in enumerate(subjects):
        assert name in printed
        assert f"{100 * (1 + number) / 40:.1f} %" in printed
    assert printed.count("1.0 – 99.0 %") >= count + 1
    assert "…" not in printed
    assert max(len(line) for line in printed.splitlines()) <= width


def test_subjects_are_named_as_they_are():
    console = Console(file=io.StringIO(), width=100, legacy_windows=False)
    metrics = [Metric("copies", "[/b]", 0.5, 0.4, 0.6, 40, {"false_positive_rate": 0.01})]
    print_table(MetricTable(metrics), ["[/b]"], console)
    assert "[/b]" in console.file.getvalue() and "40.0 – 60.0 %" in console.file.getvalue()
