"""Agreement of samples with their conditions: CLIP alignment, class agreement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import Tensor
from torch.nn import functional

from memfree.data.random_streams import EvaluationStream, generator_of
from memfree.evaluation.embedding import View
from memfree.evaluation.inputs import Inputs, Subject
from memfree.evaluation.intervals import conditions_detail, mean_interval, shared_conditions
from memfree.evaluation.metrics import HELDOUT, Metric, metric, rate_metric
from memfree.folders.untrusted import check_plain_folder
from memfree.retrieval.features.base import state_hash
from memfree.retrieval.features.clip import load_clip, load_tokenizer
from memfree.retrieval.features.preprocessing import Preprocessing

SHUFFLES = 20
"""Shuffles of the captions that are averaged: one alone would add noise to the margin."""


class ClipScorer:
    """Both towers of a CLIP in a local folder in open_clip's format, as of ``memfree train-clip``.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no CLIP that open_clip can load.
    """

    def __init__(self, folder: Path) -> None:
        import open_clip  # takes seconds, which nobody else should wait for

        if not folder.is_dir():
            raise FileNotFoundError(f"--clip {folder}: no such folder")
        check_plain_folder(folder)
        try:
            self._model: Any = load_clip(folder)
            self._tokenizer: Any = load_tokenizer(folder)
        except ValueError as error:
            raise ValueError(f"--clip {error}") from error
        self._model.eval().requires_grad_(False)
        self._prepare = Preprocessing.of_open_clip(open_clip.get_model_preprocess_cfg(self._model))
        self.describe = {"clip": {"folder": folder.name, "weights_sha256": state_hash(self._model)}}

    @torch.no_grad()
    def images(self, images: Tensor, batch_size: int = 32) -> np.ndarray:
        """Unit embeddings (N, D) float64 of images (N, C, H, W) in [-1, 1]."""
        parts = [self._model.encode_image(self._prepare(part)) for part in images.split(batch_size)]
        return functional.normalize(torch.cat(parts).double(), dim=1).numpy()

    @torch.no_grad()
    def texts(self, captions: Sequence[str], batch_size: int = 256) -> np.ndarray:
        """Unit embeddings (N, D) float64 of captions; equal ones are read once."""
        distinct = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
        parts = [
            self._model.encode_text(self._tokenizer(list(distinct)[start : start + batch_size]))
            for start in range(0, len(distinct), batch_size)
        ]
        embedded = functional.normalize(torch.cat(parts).double(), dim=1).numpy()
        return embedded[[distinct[caption] for caption in captions]]


def clip_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Cosine (n,) of each image's and its caption's unit embedding (n, D); raw, not times 100."""
    return (images * texts).sum(1)


def deranged(captions: Sequence[str], seed: int) -> np.ndarray:
    """Rows (n,) of a permutation that gives every image a caption of another text.

    Captions stand in a random order with equal ones together, and all move on by as many places
    as the most frequent one has; ValueError if that is more than half of them.
    """
    most = max(Counter(captions).values())
    if 2 * most > len(captions):
        raise ValueError("more than half of the captions are the same")
    generator = generator_of(seed, EvaluationStream.SHUFFLED_CAPTIONS)
    place = {text: generator.random() for text in sorted(set(captions))}
    places = np.array([place[text] for text in captions])
    order = np.lexsort((generator.random(len(captions)), places))
    rows = np.empty(len(captions), np.int64)
    rows[order] = np.roll(order, -most)
    return rows


def margins(
    images: np.ndarray, texts: np.ndarray, captions: Sequence[str], seed: int
) -> np.ndarray:
    """Each image's score (n,) minus the mean of its scores with shuffled captions (``deranged``).

    Images and texts are unit embeddings (n, D).
    """
    others = [
        clip_scores(images, texts[deranged(captions, seed + number)]) for number in range(SHUFFLES)
    ]
    return clip_scores(images, texts) - np.mean(others, axis=0)


def clip_metrics(inputs: Inputs, scorer: ClipScorer, seed: int) -> list[Metric]:
    """CLIP scores of the samples that have captions, and of the test images."""
    folders = {name: folder for name, folder in inputs.samples.items() if folder.captions}
    subjects = {name: (folder.images(), folder.captions or []) for name, folder in folders.items()}
    test = inputs.dataset.part("test")
    if test.captions is not None:
        subjects[HELDOUT] = (test.images(), test.captions)
    return alignment_metrics(scorer, subjects, inputs.paired, seed)


def alignment_metrics(
    scorer: ClipScorer,
    subjects: Mapping[str, tuple[Tensor, Sequence[str]]],
    paired: dict[str, str],
    seed: int,
) -> list[Metric]:
    """``clip_score`` and ``clip_margin`` of each subject, and paired differences of both.

    Intervals are Student's, over captions where several images share one. A margin is left out
    where more than half of the captions are the same.
    """
    values: dict[str, dict[str, np.ndarray]] = {}
    shared: dict[str, np.ndarray | None] = {}
    metrics: list[Metric] = []

    def add(name: str, subject: str, scores: np.ndarray, **detail: Any) -> None:
        over = conditions_detail(shared[subject])
        interval = mean_interval(scores, shared[subject])
        metrics.append(metric(name, subject, interval, len(scores), **{**detail, **over}))

    for name, (images, captions) in subjects.items():
        embedded, texts = scorer.images(images), scorer.texts(captions)
        values[name] = {"clip_score": clip_scores(embedded, texts)}
        shared[name] = shared_conditions(captions)
        with suppress(ValueError):
            values[name]["clip_margin"] = margins(embedded, texts, captions, seed)
        for measured, scores in values[name].items():
            over = conditions_detail(shared[name])
            add(measured, name, scores, captions=len(set(captions)), **over, **scorer.describe)
    for name, reference in paired.items():
        for measured, own in values.get(name, {}).items():
            other = values.get(reference, {}).get(measured)
            if other is not None and len(other) == len(own):
                add(f"{measured}_difference", name, own - other, reference=reference)
    return metrics


def pair_report(
    scorer: ClipScorer, images: Tensor, captions: Sequence[str], seed: int
) -> dict[str, float | int]:
    """How good a CLIP is on pairs that it has not seen: mean cosine, margin with its 95 % interval.

    ``median_rank`` is that of an image's caption among all distinct ones (1 is first),
    ``top_tenth`` the share of those in the first tenth.
    """
    embedded, texts = scorer.images(images), scorer.texts(captions)
    margin = mean_interval(margins(embedded, texts, captions, seed), shared_conditions(captions))
    low, high = margin.bounds
    first = np.unique(list(captions), return_index=True)[1]
    cosines = embedded @ texts[first].T
    scores = clip_scores(embedded, texts)
    rank = 1 + (cosines > scores[:, None] + 1e-12).sum(1)
    return {
        "pairs": len(captions),
        "score": float(scores.mean()),
        "margin": margin.value,
        "low": low,
        "high": high,
        "captions": len(first),
        "median_rank": float(np.median(rank)),
        "top_tenth": float((rank <= len(first) / 10).mean()),
    }


@dataclass(frozen=True)
class ClassJudge:
    """A classifier trained on the fit images, chosen by cross-validation among them alone."""

    classifier: Pipeline
    features: str  # that it reads: ``pixels`` or ``efficientnet``
    name: str
    cross_validated: float  # accuracy in cross-validation on the fit images

    @classmethod
    def fit(cls, features: dict[str, np.ndarray], labels: np.ndarray, seed: int) -> ClassJudge:
        """Try the candidates on the fit part and train the best of them on all of it.

        Raises:
            ValueError: fewer than two classes, or a class with a single image.
        """
        counts = np.unique(labels, return_counts=True)[1]
        if len(counts) < 2 or counts.min() < 2:
            raise ValueError(
                "class agreement needs at least two classes with two fit images each; prepare the "
                "dataset with a larger fit part"
            )
        folds = StratifiedKFold(min(5, int(counts.min())), shuffle=True, random_state=seed)
        judges = []
        for name, space, classifier in _candidates(features):
            scores = cross_val_score(classifier, features[space], labels, cv=folds)
            judges.append(cls(classifier, space, name, float(scores.mean())))
        best = max(judges, key=lambda judge: judge.cross_validated)
        best.classifier.fit(features[best.features], labels)
        return best

    def knows(self, classes: np.ndarray) -> np.ndarray:
        """(n,) bool: the class was among the fit images, so that it can be recognised."""
        return np.isin(classes, self.classifier.classes_)

    def agrees(self, features: dict[str, np.ndarray], classes: np.ndarray) -> np.ndarray:
        """(n,) bool: the classifier names the wanted class."""
        return self.classifier.predict(features[self.features]) == classes

    def metric(
        self, subject: str, agrees: np.ndarray, conditions: np.ndarray | None = None
    ) -> Metric:
        """The rate ``class_agreement``; for ``heldout`` it is the ceiling, the test accuracy."""
        detail: dict[str, Any] = {"classifier": self.name, "features": self.features}
        detail["cross_validated_accuracy"] = round(self.cross_validated, 4)
        if subject == HELDOUT:
            detail["meaning"] = "accuracy on test images, the ceiling"
        return rate_metric("class_agreement", subject, agrees, conditions, **detail)


def _candidates(features: dict[str, np.ndarray]) -> list[tuple[str, str, Pipeline]]:
    """(name, features, classifier) to choose from."""
    candidates = []
    for space in features:
        # Pixels share one scale; features of a network do not.
        scale = [] if space == "pixels" else [StandardScaler()]
        logistic = LogisticRegression(max_iter=2000, C=0.1)
        candidates += [
            ("logistic regression", space, make_pipeline(*scale, logistic)),
            ("SVC, radial kernel", space, make_pipeline(*scale, SVC(C=10))),
        ]
    return candidates


def class_metrics(
    inputs: Inputs, subjects: dict[str, Subject], fit_view: View, seed: int, console: Console
) -> list[Metric]:
    """Class agreement of the class-conditional samples; sets ``agrees`` of the subjects."""
    labels = inputs.dataset.part("fit").labels
    if labels is None or all(subjects[name].labels is None for name in inputs.samples):
        return []
    try:
        judge = ClassJudge.fit(fit_view.classifier_features(), labels.numpy(), seed)
    except ValueError as error:
        console.print(f"Class agreement is left out: {error}", markup=False)
        return []
    metrics = []
    for name, subject in subjects.items():
        if subject.labels is None:
            continue
        known = judge.knows(subject.labels)
        if known.any():
            features = subject.view.take(np.flatnonzero(known)).classifier_features()
            subject.agrees = judge.agrees(features, subject.labels[known])
            if subject.conditions is not None:
                subject.agrees_conditions = shared_conditions(subject.conditions[known])
            metrics.append(judge.metric(name, subject.agrees, subject.agrees_conditions))
    return metrics
