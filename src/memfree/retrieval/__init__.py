"""Feature extractors and the reference index of training images."""

from memfree.retrieval.clip import CLIPFeatures
from memfree.retrieval.efficientnet import EfficientNetFeatures
from memfree.retrieval.features import Features, PixelFeatures
from memfree.retrieval.index import ReferenceIndex
from memfree.retrieval.latents import LatentFeatures
from memfree.retrieval.search import Hits
from memfree.retrieval.sscd import SSCDFeatures
from memfree.retrieval.timm_features import TimmFeatures
from memfree.retrieval.whitening import Whitened

__all__ = [
    "CLIPFeatures",
    "EfficientNetFeatures",
    "Features",
    "Hits",
    "LatentFeatures",
    "PixelFeatures",
    "ReferenceIndex",
    "SSCDFeatures",
    "TimmFeatures",
    "Whitened",
]
