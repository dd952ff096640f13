"""Similarity, thresholds, calibration, AMG and multiplicity guidance: tensors in, tensors out."""

from memfree.guidance.amg import AntiMemorizationGuidance
from memfree.guidance.calibration import (
    Calibration,
    calibrate,
    calibration_of,
    default_similarity,
    measure,
)
from memfree.guidance.detection import Cadence, Observer
from memfree.guidance.mitigation import Mitigation, Start
from memfree.guidance.mitigation_names import TEXT_ONLY, WITH_AMG, WITH_INDEX
from memfree.guidance.multiplicity import MultiplicityGuidance
from memfree.guidance.prediction import Guidance, Prediction, apply
from memfree.guidance.settings import GuidanceSettings
from memfree.guidance.similarity import EmbeddingSimilarity, Match, NormalizedL2, Similarity
from memfree.guidance.threshold import ConstantThreshold, ThresholdSchedule

__all__ = [
    "TEXT_ONLY",
    "WITH_AMG",
    "WITH_INDEX",
    "AntiMemorizationGuidance",
    "Cadence",
    "Calibration",
    "ConstantThreshold",
    "EmbeddingSimilarity",
    "Guidance",
    "GuidanceSettings",
    "Match",
    "Mitigation",
    "MultiplicityGuidance",
    "NormalizedL2",
    "Observer",
    "Prediction",
    "Similarity",
    "Start",
    "ThresholdSchedule",
    "apply",
    "calibrate",
    "calibration_of",
    "default_similarity",
    "measure",
]
