"""Do samples show the class they were asked for? A classifier of the fit images answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from memfree.evaluation.intervals import conditions_detail, rate_interval
from memfree.evaluation.metrics import HELDOUT, Metric, metric


@dataclass(frozen=True)
class ClassJudge:
    """A classifier trained on the fit images, chosen by cross-validation among them alone."""

    classifier: Pipeline
    features: str
    """``pixels`` or ``efficientnet``: which features it reads."""
    name: str
    cross_validated: float
    """Its accuracy in cross-validation on the fit images."""

    @classmethod
    def fit(cls, features: dict[str, np.ndarray], labels: np.ndarray, seed: int) -> ClassJudge:
        """Try the candidates on the fit part and train the best of them on all of it.

        Args:
            features: name to (n, D) features of the fit images.
            labels: (n,) classes.
            seed: of the folds.

        Raises:
            ValueError: fewer than two classes, or a class with a single image.
        """
        counts = np.unique(labels, return_counts=True)[1]
        if len(counts) < 2 or counts.min() < 2:
            raise ValueError(
                "class agreement needs at least two classes with two fit images each; prepare the "
                "data set with a larger fit part"
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
        notes = {"meaning": "accuracy on test images, the ceiling"} if subject == HELDOUT else {}
        return metric(
            "class_agreement",
            subject,
            rate_interval(agrees, conditions),
            len(agrees),
            **conditions_detail(conditions),
            classifier=self.name,
            features=self.features,
            cross_validated_accuracy=round(self.cross_validated, 4),
            **notes,
        )


def _candidates(features: dict[str, np.ndarray]) -> list[tuple[str, str, Pipeline]]:
    """(name, features, classifier) to choose from."""
    found = []
    for space in features:
        # Pixels share one scale; features of a network do not.
        scale = [] if space == "pixels" else [StandardScaler()]
        logistic = LogisticRegression(max_iter=2000, C=0.1)
        found += [
            ("logistic regression", space, make_pipeline(*scale, logistic)),
            ("SVC, radial kernel", space, make_pipeline(*scale, SVC(C=10))),
        ]
    return found
