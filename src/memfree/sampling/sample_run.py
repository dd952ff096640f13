"""Sample run: its settings, which samples are missing, and a summary of its traces."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jsonargparse.typing import PositiveInt

from memfree.data.options import PromptSet
from memfree.folders.atomic import remove_temporary, write_json
from memfree.folders.claim import first_difference, or_another, refuse_files, refuse_other
from memfree.folders.lock import WHOLE, FolderLock, Part, read_holder
from memfree.folders.manifest import read_manifest, write_manifest
from memfree.folders.untrusted import read_json, read_table, short
from memfree.slurm.launcher import is_first_process

SchedulerName = Literal["ddpm", "ddim", "dpmsolver++", "dpmsolver++-karras", "euler", "unipc"]


@dataclass
class PromptOptions:
    """Prompts of a text-to-image model; sample i takes prompt i, starting over at the end."""

    file: Path | None = None
    """Text file with one prompt per line."""
    dataset: Path | None = None
    """Captioned dataset folder to take prompts from."""
    captions: PromptSet = "duplicated"
    """Which of its captions: of repeated or of other training images, or of the test part."""
    least_records: PositiveInt = 2
    """Number of training records from which an image counts as repeated."""


RUN_FILE = "run.json"
_FILE = re.compile(r"(samples|trace)-[0-9-]+\.(tar|parquet)")
_WITHOUT_SAMPLES = r"\..*|run\.json|config\.yaml|trace-[0-9-]+\.(tar|parquet)"
"""Files of a run that stopped before its first sample."""
_LOCK = re.compile(r"\.lock-(\d+-)?\d+")
GATE_TOLERANCE = 1e-4  # a σ this close may pass the gate or not, depending on the batch size


def trace_summary(
    traces: Sequence[Path],
    conditions: Mapping[int, int | str | None],
    labels: Mapping[str, int | str] | None,
) -> dict[str, float | int | None]:
    """Counts over all traces of a run, read one at a time.

    Shares ``active_samples`` and ``active_steps``: samples and sample-steps steered.
    ``undecided_samples``: number with |σ_t − gate| < 1e-4 at some step (λ_t without a ``gate``).
    ``other_label_steps``: share of steered sample-steps whose nearest image has another label,
    where eq. 16 may cost a denoiser call (None without steered steps or ``labels`` by image key).
    """
    rows = active_rows = other = 0
    samples: set[int] = set()
    active: set[int] = set()
    undecided: set[int] = set()
    for path in traces:
        table = read_table(path)
        sample = table["sample"].to_numpy()
        sigma = table["sigma"].to_numpy(zero_copy_only=False)
        gate = table["gate" if "gate" in table.column_names else "lambda"].to_numpy()
        is_active = table["active"].to_numpy(zero_copy_only=False).astype(bool)
        near = np.abs(sigma - gate) < GATE_TOLERANCE
        rows += len(sample)
        active_rows += int(is_active.sum())
        samples.update(sample.tolist())
        active.update(sample[is_active].tolist())
        undecided.update(sample[near].tolist())
        if labels is not None:
            nearest = table["nearest"].filter(is_active).to_pylist()
            other += sum(
                labels.get(key) != conditions[i]
                for key, i in zip(nearest, sample[is_active].tolist(), strict=True)
            )
    known = labels is not None and all(conditions[i] is not None for i in samples)
    return {
        "active_samples": len(active) / max(len(samples), 1),
        "active_steps": active_rows / max(rows, 1),
        "undecided_samples": len(undecided),
        "other_label_steps": other / active_rows if known and active_rows else None,
    }


class SampleRun:
    """The output folder of one sampling run, which may be stopped and resumed.

    ``run.json`` is written first and holds all settings that affect the samples; another run is
    refused. A sample is finished when its shard has its final name. ``manifest.json`` is written
    last. As a context manager it begins the run and releases its locks.

    Args:
        settings: nested JSON values; names that end in ``_sha256`` stand for contents.
        count: samples of the whole run, indices 0 to count − 1.
        part: the indices that this process and its ranks draw; others may draw theirs meanwhile.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], count: int, part: Part = WHOLE
    ) -> None:
        self.folder = Path(folder)
        self.settings = {"count": count, **json.loads(json.dumps(settings))}
        self.count = count
        self.part = part
        self._manifest = self.folder / "manifest.json"
        self._prefix = "" if part.whole else f"{part.number:03d}-"
        self._locks: dict[int, FolderLock] = {}

    def __enter__(self) -> SampleRun:
        try:
            self.begin()
        except BaseException:
            self.release()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def check(self) -> None:
        """Raise unless the folder holds this run or no samples; writes nothing."""
        begun = self.folder / RUN_FILE
        # Another part may have begun without a shard yet.
        taken = self._manifest.is_file() or self.shards() or not self.part.whole
        if begun.is_file() and taken:
            with or_another():
                settings = read_json(begun)
            refuse_other(self.folder, first_difference(settings, self.settings))
        else:
            refuse_files(self.folder, _WITHOUT_SAMPLES)

    def begin(self) -> None:
        """``check``, create and lock the folder; only the first process writes."""
        self.check()
        if is_first_process() and not self.finished:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock(0)
            self._manifest.unlink(missing_ok=True)  # a shard has been lost since
            write_json(self.folder / RUN_FILE, self.settings)

    @property
    def finished(self) -> bool:
        """Whether the manifest and all shards it lists exist."""
        if not self._manifest.is_file():
            return False
        names = self.manifest().get("shards")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{self._manifest} does not list the shards; draw the samples again")
        return all((self.folder / name).is_file() for name in names)

    def verify(self) -> None:
        """Compare file sizes with the manifest's; ValueError names the shard to delete."""
        files = self.manifest().get("files", {})
        if not isinstance(files, dict) or not all(_FILE.fullmatch(name) for name in files):
            raise ValueError(f"{self._manifest} does not list the files; draw the samples again")
        for name, size in files.items():
            path = self.folder / name
            actual = path.stat().st_size if path.is_file() else 0
            if actual != size:
                shard = path.with_name(f"samples-{path.stem.split('-', 1)[1]}.tar")
                raise ValueError(
                    f"{path} has {actual} bytes, not {short(size)}: delete {shard} and repeat the "
                    "command to draw its samples again"
                )

    def lock(self, rank: int, wait: float = 0.0) -> None:
        """Lock this rank's shards until this process ends; ``wait``: seconds for another to end."""
        if rank in self._locks:
            return
        lock = FolderLock(self.folder / f".lock-{self.writer(rank)}", f"--out {self.folder}")
        lock.acquire(wait)
        self._locks[rank] = lock

    def release(self) -> None:
        """Release this process's locks."""
        while self._locks:
            self._locks.popitem()[1].release()

    def writer(self, rank: int) -> str:
        """Start of this rank's shard names, after ``samples-``."""
        return f"{self._prefix}{rank:03d}"

    def clean_up(self) -> None:
        """Remove temporary files and traces without samples left by a stopped run of this part."""
        temporary = ".*.tmp" if self.part.whole else f".*-{self._prefix}*.tmp"
        remove_temporary(self.folder, pattern=temporary)
        for trace in self.folder.glob(f"trace-{self._prefix}*.parquet"):
            shard = self.folder / f"samples-{trace.stem[6:]}.tar"
            if _FILE.fullmatch(trace.name) and not shard.is_file():
                trace.unlink(missing_ok=True)

    def shards(self) -> list[Path]:
        """Finished shards, sorted by name."""
        return sorted(self.folder.glob("samples-*.tar"))

    def missing(self) -> list[int]:
        """Indices without a finished sample, ascending; ValueError if a shard is damaged."""
        finished: set[int] = set()
        for shard in self.shards():
            indices = shard_indices(shard)
            if twice := finished.intersection(indices):
                raise ValueError(f"{shard} repeats sample {min(twice)}; remove it and start again")
            finished.update(indices)
        if finished and max(finished) >= self.count:
            raise ValueError(f"{self.folder} holds sample {max(finished)} of {self.count}")
        return [index for index in range(self.count) if index not in finished]

    def missing_here(self) -> list[int]:
        """This part's missing indices."""
        return sorted({*self.missing()}.intersection(self.part.share(range(self.count))))

    def next_shard(self, rank: int) -> int:
        """This rank's first unused shard number."""
        shards = self.folder.glob(f"samples-{self.writer(rank)}-*.tar")
        numbers = [path.stem.rsplit("-", 1)[1] for path in shards]
        return max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1

    def finish(self, seed: int, **fields: Any) -> None:
        """Write the manifest of the whole folder; ValueError if a sample is missing."""
        if missing := self.missing():
            raise ValueError(
                f"{self.folder} lacks {len(missing)} of {self.count} samples (first: {missing[0]});"
                " repeat the command to draw them"
            )
        for lock in self.folder.glob(".lock-*"):
            if _LOCK.fullmatch(lock.name) and not lock.is_symlink() and read_holder(lock):
                lock.unlink(missing_ok=True)
        shards, traces = self.shards(), sorted(self.folder.glob("trace-*.parquet"))
        write_manifest(
            self.folder,
            "samples",
            seed,
            count=self.count,
            settings=self.settings,
            shards=[path.name for path in shards],
            files={path.name: path.stat().st_size for path in [*shards, *traces]},
            **fields,
        )

    def manifest(self) -> dict[str, Any]:
        """Manifest of the finished folder."""
        return read_manifest(self.folder, "samples")


def shard_indices(shard: Path) -> list[int]:
    """Sample indices in a shard, from its member names; ValueError if it is damaged."""
    try:
        if not shard.is_file():
            raise ValueError("not a plain file")
        with tarfile.open(shard, "r:") as tar:
            names = [member.name for member in tar if member.name.endswith(".png")]
        return [int(name[:-4]) for name in names]
    except (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{shard} is damaged ({short(error)}); remove it and repeat the command that drew it"
        ) from error
