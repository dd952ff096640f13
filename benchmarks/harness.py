"""Timing of a function against its peer in one process, and the records that benchmarks write.

Every benchmark is a module with a function ``run(tiny)``. ``python benchmarks/NAME.py`` measures
and writes benchmarks/results/NAME.json; with ``--tiny`` the same code runs at the smallest sizes,
prints its table and writes nothing: it shows that the benchmark works.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).parent / "results"
Records = list[dict[str, Any]]


@dataclass
class Timing:
    """Seconds of one function over interleaved repetitions."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """Median seconds of a call."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """Lower and upper quartile."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return low, high


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    repetitions: int = 9,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time functions in turn, A B A B …, so that a busy machine slows all of them alike.

    Args:
        functions: what to call, by name.
        repetitions: timed calls of each, at least 2.
        warmup: calls of each beforehand that are not timed.
        clock: seconds; ``time.process_time`` on one thread is the work done, whatever else runs.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repetitions):
        for name, function in functions.items():
            _synchronize()
            start = clock()
            function()
            _synchronize()
            seconds[name].append(clock() - start)
    return {name: Timing(values) for name, values in seconds.items()}


def paired_ratio(ours: Timing, peer: Timing) -> float:
    """Median over repetitions of ours/peer of the same repetition."""
    return statistics.median(a / b for a, b in zip(ours.seconds, peer.seconds, strict=True))


def record(
    name: str, ours: float, peer: float, unit: str, ratio: float | None = None, **detail: Any
) -> dict[str, Any]:
    """One result: ``name, ours, peer, ratio, unit, machine, command``, and what explains it.

    Args:
        name: what was measured.
        ours: our number, in ``unit``.
        peer: the number it is compared with.
        unit: of both.
        ratio: ours over peer; None: of the two numbers.
        detail: more to know, JSON values.
    """
    return {
        "name": name,
        "ours": ours,
        "peer": peer,
        "ratio": ours / peer if ratio is None else ratio,
        "unit": unit,
        "machine": machine(),
        "command": f"python benchmarks/{Path(sys.argv[0]).name}",
        **detail,
    }


def compared(
    name: str, timings: Mapping[str, Timing], ours: str, peer: str, **detail: Any
) -> dict[str, Any]:
    """The record of two interleaved timings: medians in seconds, paired ratio, quartiles."""
    return record(
        name,
        timings[ours].median,
        timings[peer].median,
        "s",
        paired_ratio(timings[ours], timings[peer]),
        repetitions=len(timings[ours].seconds),
        ours_quartiles=list(timings[ours].spread),
        peer_quartiles=list(timings[peer].spread),
        **detail,
    )


def machine() -> str:
    """The processor or GPU, threads, and torch's version, in one line."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    return f"{device}, torch {torch.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def additional_memory(function: Callable[[], object]) -> int | None:
    """Bytes of tensors that one call holds at most beyond what is there before it.

    On the GPU from the allocator's statistics, on the CPU by adding up the profiler's allocations;
    None if this version's profiler does not tell them. Memory that NumPy or FAISS allocate is not
    seen.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    results = getattr(profiled.profiler, "kineto_results", None)
    if results is None:
        return None
    changes = [event for event in results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def measure(
    name: str,
    run: Callable[[bool], Records],
    arguments: Sequence[str] | None = None,
    folder: Path = RESULTS,
) -> Records:
    """Run a benchmark, print its records as a table, and write ``folder/NAME.json``.

    Args:
        name: the benchmark's.
        run: measures; told whether at the smallest sizes.
        arguments: words of the command line, by default those of this process: none or ``--tiny``.
        folder: where the records are written, but those of the smallest sizes, which are nowhere.
    """
    parser = argparse.ArgumentParser(prog=f"benchmarks/{name}.py", allow_abbrev=False)
    parser.add_argument(
        "--tiny", action="store_true", help="the smallest sizes, in seconds; writes nothing"
    )
    tiny = parser.parse_args(arguments).tiny
    records = run(tiny)
    text = json.dumps(records, indent=2, allow_nan=False) + "\n"
    if not tiny:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{name}.json.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, folder / f"{name}.json")
    print_table(name, records)
    return records


def print_table(name: str, records: Records) -> None:
    """Print records, one a line."""
    table = Table(title=f"{name} ({records[0]['machine']})" if records else name)
    for column in ("what", "ours", "peer", "unit", "ours / peer"):
        table.add_column(column, justify="left" if column in ("what", "unit") else "right")
    for entry in records:
        numbers = (f"{entry[key]:.4g}" for key in ("ours", "peer"))
        table.add_row(entry["name"], *numbers, entry["unit"], f"{entry['ratio']:.3g}")
    Console().print(table)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
