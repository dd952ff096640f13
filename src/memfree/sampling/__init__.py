"""Sampling: the denoising loop, and the Lightning module, writer and reader around it."""

from memfree.sampling.folder import SampleFolder
from memfree.sampling.loop import Result, sample
from memfree.sampling.module import SampleBatch, SampleIndices, SamplingModule
from memfree.sampling.run import SampleRun
from memfree.sampling.writer import SampleWriter

__all__ = [
    "Result",
    "SampleBatch",
    "SampleFolder",
    "SampleIndices",
    "SampleRun",
    "SampleWriter",
    "SamplingModule",
    "sample",
]
