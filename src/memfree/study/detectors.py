"""How early and how well copies are foreseen: Wen's norm against σ_t of the index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from memfree.evaluation.detection import Detector, detector
from memfree.evaluation.intervals import shared_conditions
from memfree.untrusted import read_table

EARLY = (0, 3)
"""Numbers of the denoising steps after which σ_t is judged."""


@dataclass(frozen=True)
class Roc:
    """A score of unguided samples as a detector of those that end as copies by pixels."""

    title: str
    detector: Detector


def detectors(
    samples: Path, evaluation: Path, prompt_sets: Sequence[str], subject: str
) -> list[Roc]:
    """ROC curves over the samples of all prompt sets together, with intervals over captions.

    The truth is the verdict by pixels, which no score is made of. Scores: Wen's norm at the first
    step, and σ_t of the index early on.

    Args:
        samples: the study's sample folders by prompt set and subject; studies of other noise have
            others.
        evaluation: evaluations of these samples by prompt set.
        prompt_sets: which of them.
        subject: unguided samples, whose trace has ``wen_norm`` where that was recorded.

    Returns:
        One a score; none where no sample is a copy, or all are.
    """
    truth: list[np.ndarray] = []
    captions: list[str] = []
    scores: dict[str, list[np.ndarray]] = {}
    for prompts in prompt_sets:
        judged = read_table(evaluation / prompts / "pixels" / "per_sample.parquet")
        mine = judged.filter(pc.equal(judged["subject"], subject)).sort_by("sample")
        truth.append(mine["second_copy"].to_numpy(zero_copy_only=False).astype(bool))
        captions += mine["caption"].to_pylist() if "caption" in mine.column_names else []
        for title, values in _scores(samples / prompts / subject).items():
            scores.setdefault(title, []).append(values)
    copies = np.concatenate(truth)
    if copies.all() or not copies.any():
        return []
    clusters = shared_conditions(captions) if len(captions) == len(copies) else None
    return [
        Roc(title, detector(np.concatenate(parts), copies, clusters=clusters))
        for title, parts in scores.items()
        if len(parts) == len(prompt_sets)
    ]


def _scores(folder: Path) -> dict[str, np.ndarray]:
    """Scores (n,) by title, from the trace of a sample folder."""
    trace = pa.concat_tables([read_table(path) for path in sorted(folder.glob("trace-*"))])
    found = {}
    for step in EARLY:
        rows = trace.filter(pc.equal(trace["step"], step)).sort_by("sample")
        if step == 0 and "wen_norm" in rows.column_names:
            found["Wen's norm, step 1"] = rows["wen_norm"].to_numpy()
        found[f"σ_t, step {step + 1}"] = rows["sigma"].to_numpy()
    return found
