"""Runs the commands of a cell: shared ones are waited for, and all are timed."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from memfree.folders.atomic_files import write_json
from memfree.folders.folder_lock import FolderLock
from memfree.stages import Stage, run_stages
from memfree.study.cells import Cell
from memfree.study.plan import Plan
from memfree.untrusted import read_json, short


class CellRun:
    """One cell of a study, and what is known of its commands.

    ``CELL/study-NAME.json`` lists each command with the seconds that it has taken. The cell is
    finished where the list has all commands of the plan and its figures are there: a subject that
    was added since, or an option that was changed, makes the cell run again, and each command that
    is done says so.

    Args:
        plan: the study.
        cell: one of its cells.
    """

    def __init__(self, plan: Plan, cell: Cell) -> None:
        self.stages = plan.stages(cell)
        self._path = plan.cell(cell) / f"study-{plan.name}.json"
        self._figures = plan.evaluation(cell) / "manifest.json"
        self._turns = plan.out / ".turns"

    @property
    def finished(self) -> bool:
        """Whether all its commands, as they are planned now, were run to the end."""
        known = self.known()
        return self._figures.is_file() and [*known] == [stage.line() for stage in self.stages]

    def known(self) -> dict[str, float]:
        """Seconds of each command that was run to its end, by its line.

        Raises:
            ValueError: the record is damaged.
        """
        if not self._path.is_file():
            return {}
        try:
            rows = read_json(self._path)
            return {str(row["command"]): float(row["seconds"]) for row in rows}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self._path} is damaged ({short(error)}): delete it") from error

    def run(self, console: Console) -> None:
        """Run what is missing; another process that runs the same command is waited for."""
        before, now = self.known(), dict[str, float]()
        for number, stage in enumerate(self.stages, 1):
            line = stage.line()
            console.rule(f"{number} of {len(self.stages)}: {stage.command}", align="left")
            with _turn(self._turns, stage, console):
                start = time.perf_counter()
                run_stages([stage], console)
            now[line] = before.get(line, 0.0) + time.perf_counter() - start
            self._write({**before, **now} if number < len(self.stages) else now)

    def _write(self, seconds: dict[str, float]) -> None:
        rows: list[dict[str, Any]] = [
            {"command": line, "seconds": round(value, 2)} for line, value in seconds.items()
        ]
        write_json(self._path, rows)


@contextmanager
def _turn(folder: Path, stage: Stage, console: Console) -> Iterator[None]:
    """Keep two processes from running one command at once; who comes second finds it done.

    Unlike the command's own lock, which refuses a second writer, this one waits. It lies in the
    study's folder, and is the same however ``--out`` is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out = Path(stage.options["out"]).resolve()
    name = hashlib.sha256(str(out).encode()).hexdigest()[:16]
    lock = FolderLock(folder / name, f"--out {stage.options['out']}")
    try:
        lock.acquire()
    except ValueError:
        line = f"waiting for another process that makes {stage.options['out']}"
        console.print(line, style="dim", markup=False, emoji=False, soft_wrap=True)
        lock.acquire(wait=math.inf)
    try:
        yield
    finally:
        lock.release()
