"""Feature extractors and the reference index of training images."""

from memfree.retrieval.efficientnet import EfficientNetFeatures
from memfree.retrieval.features import Features, PixelFeatures
from memfree.retrieval.index import ReferenceIndex
from memfree.retrieval.search import Hits
from memfree.retrieval.whitening import Whitened

__all__ = [
    "EfficientNetFeatures",
    "Features",
    "Hits",
    "PixelFeatures",
    "ReferenceIndex",
    "Whitened",
]
