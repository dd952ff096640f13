"""The benchmarks' own arithmetic: interleaving, paired ratios, memory."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "benchmarks" / "harness.py"


@pytest.fixture(scope="module")
def harness():
    spec = importlib.util.spec_from_file_location("benchmark_harness", PATH)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_functions_take_turns(harness):
    calls = []
    timings = harness.interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repetitions=3, warmup=1
    )
    assert calls == ["a", "b"] * 4
    assert [len(timing.seconds) for timing in timings.values()] == [3, 3]


def test_ratio_is_paired(harness):
    """A machine that slows down for one pair changes both of its times, not the ratio."""
    ours, peer = harness.Timing([2.0, 20.0, 2.0]), harness.Timing([1.0, 10.0, 1.0])
    assert harness.paired_ratio(ours, peer) == 2
    assert ours.median == 2


def test_time_is_wall_time(harness):
    timings = harness.interleaved({"sleep": lambda: time.sleep(0.02)}, repetitions=2, warmup=0)
    assert timings["sleep"].median >= 0.02


def test_additional_memory_is_what_is_held_at_once(harness):
    def use_two_then_one():
        one = torch.ones(1000, 1000)
        two = one + 1
        del one
        return two * 2

    assert abs(harness.additional_memory(use_two_then_one) - 8_000_000) < 10_000


def test_results_are_written(harness, tmp_path, capsys):
    entry = harness.record("search", 3.0, 2.0, "s", limit=2)
    harness.measure("demo", lambda tiny: [entry], [], tmp_path)
    written = json.loads((tmp_path / "demo.json").read_text())
    assert written[0]["ratio"] == 1.5
    assert {"name", "ours", "peer", "ratio", "unit", "machine", "command"} <= written[0].keys()
    assert "search" in capsys.readouterr().out
