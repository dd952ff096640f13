"""Copies by a measure that no guidance saw: whitened EfficientNet features, calibrated alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.decomposition import PCA

from memfree.evaluation.embedding import fit_components
from memfree.evaluation.intervals import wilson
from memfree.evaluation.records import Metric, metric
from memfree.guidance import Calibration

NAME = "whitened-efficientnet"


@dataclass(frozen=True)
class SecondSimilarity:
    """Cosine of whitened embeddings to the nearest training image, with its own calibration.

    A guidance that is judged by its own measure can push samples just past the line. This one
    shares nothing with it: other features, whitened on the fit part, and thresholds measured on
    the calibration part at the same false-positive rate.
    """

    components: PCA
    references: torch.Tensor
    """(rows, d) float64 unit vectors of the distinct training images."""
    calibration: Calibration
    describe: dict
    """Extractor and size, for the metrics' detail."""

    @classmethod
    def fit(
        cls, fit: np.ndarray, train: np.ndarray, calibration: np.ndarray, extractor: dict
    ) -> SecondSimilarity:
        """Whiten on ``fit``, refer to ``train``, calibrate on ``calibration``.

        Args:
            fit: (n, D) embeddings of the fit part.
            train: (rows, D) of the distinct training images.
            calibration: (m, D) of the calibration part.
            extractor: what identifies the embedding.
        """
        components = fit_components(fit, whiten=True)
        references = _unit(components, train)
        sigmas = _best_cosine(_unit(components, calibration), references).float()
        describe = {"extractor": extractor, "components": int(components.n_components_)}
        calibrated = Calibration(NAME, sigmas.sort().values)
        return cls(components, references, calibrated, describe)

    def sigma(self, embeddings: np.ndarray) -> np.ndarray:
        """Cosine to the nearest training image, (n,), for embeddings (n, D)."""
        return _best_cosine(_unit(self.components, embeddings), self.references).numpy()

    def copies(self, sigma: np.ndarray, false_positive_rate: float) -> np.ndarray:
        """(n,) bool: above the threshold of this false-positive rate."""
        # float32, as the calibration is: the same image must not compare differently with itself
        return sigma.astype(np.float32) > self.calibration.threshold(false_positive_rate)

    def metric(self, subject: str, flags: np.ndarray, false_positive_rate: float) -> Metric:
        """The rate ``second_copies`` of one subject."""
        return metric(
            "second_copies",
            subject,
            wilson(int(flags.sum()), len(flags)),
            len(flags),
            similarity=NAME,
            threshold=self.calibration.threshold(false_positive_rate),
            false_positive_rate=false_positive_rate,
            **self.describe,
        )


def _unit(components: PCA, embeddings: np.ndarray) -> torch.Tensor:
    whitened = torch.from_numpy(components.transform(embeddings))
    return torch.nn.functional.normalize(whitened, dim=1)


def _best_cosine(queries: torch.Tensor, references: torch.Tensor, chunk: int = 1024):
    """(n,) largest cosine of each query to any reference."""
    return torch.cat([(part @ references.T).amax(1) for part in queries.split(chunk)])
