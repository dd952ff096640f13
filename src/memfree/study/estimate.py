"""How large a study is, and how long what is left of it may take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from memfree.stages import Stage
from memfree.study.running import CellRun

UNITS = {"train": "trainer.max_steps", "sample": "count"}
"""Option that a command's time grows with; the others take as long each time."""


def plan_size(runs: Sequence[CellRun]) -> str:
    """Lines for the terminal: trainings, samples, what is finished, and an estimate of the rest.

    The estimate takes the seconds a training step, a sample, or a run of another command from those
    that are finished.

    Args:
        runs: cells; a command that several have counts once.
    """
    stages = {stage.line(): stage for run in runs for stage in run.stages}
    seconds = {line: value for run in runs for line, value in run.known().items() if line in stages}
    done = {line for line, stage in stages.items() if _is_done(stage)}
    parts = [f"{len(runs)} cells", f"{len(stages)} commands, {len(done)} of them finished"]
    for command, noun in (("train", "trainings"), ("sample", "samplings")):
        of = [line for line, stage in stages.items() if stage.command == command]
        units = sum(_units(stages[line]) for line in of)
        what = "steps" if command == "train" else "samples"
        finished = sum(line in done for line in of)
        parts.append(f"{len(of)} {noun} ({units} {what}), {finished} finished")
    left = estimate([stages[line] for line in stages if line not in done], stages, seconds)
    parts.append(
        "no command is finished that the rest could be estimated from"
        if left is None
        else f"the rest may take about {_duration(left)}, one command after another"
    )
    return "\n".join(parts)


def estimate(
    left: Sequence[Stage], known: dict[str, Stage], seconds: dict[str, float]
) -> float | None:
    """Seconds that commands may take.

    Args:
        left: the commands to estimate.
        known: commands by line.
        seconds: what some of those took.

    Returns:
        None if none of a command's kind is known.
    """
    total: dict[str, float] = defaultdict(float)
    units: dict[str, int] = defaultdict(int)
    for line, taken in seconds.items():
        total[known[line].command] += taken
        units[known[line].command] += _units(known[line])
    if any(stage.command not in total for stage in left):
        return None
    return sum(total[stage.command] / units[stage.command] * _units(stage) for stage in left)


def _units(stage: Stage) -> int:
    return int(stage.options[UNITS[stage.command]]) if stage.command in UNITS else 1


def _is_done(stage: Stage) -> bool:
    return (Path(stage.options["out"]) / "manifest.json").is_file()


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.0f} minutes"
