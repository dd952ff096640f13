"""Epochs of batches for the tests of this package."""

from memfree.data.batches import EpochLoader


def epoch_of(dataset, epoch=0, start=0, workers=0):
    """The batches of one epoch from ``start`` on, as a training gets them."""
    return list(EpochLoader(dataset, workers, lambda: (epoch, start), lambda batch: None))


def keys(batches):
    return [key for batch in batches for key in batch["key"]]
