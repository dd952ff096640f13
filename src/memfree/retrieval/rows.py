"""What there is to read of an index's rows: keys, groups, counts, labels and captions."""

from __future__ import annotations

from torch import Tensor

from memfree.retrieval.features import Features, Metric
from memfree.retrieval.items import Items


class Rows:
    """The columns of a reference index.

    Attributes:
        features: the extractor of the rows' vectors.
        items: keys, groups, multiplicities and conditions of the rows.
    """

    features: Features
    items: Items

    @property
    def metric(self) -> Metric:
        """``l2`` or ``cosine``, from the extractor."""
        return self.features.metric

    @property
    def keys(self) -> list[str]:
        """Image key of every row."""
        return self.items.keys

    @property
    def group(self) -> Tensor:
        """(rows,) int64 group number of every row."""
        return self.items.group

    @property
    def multiplicity(self) -> Tensor:
        """(rows,) int64: training records of exactly that image."""
        return self.items.multiplicity

    @property
    def group_multiplicity(self) -> Tensor:
        """(rows,) int64: training records of the row's whole group."""
        return self.items.group_multiplicity

    @property
    def labels(self) -> Tensor | None:
        """(rows,) int64: the most frequent label of every row, None without labels."""
        return self.items.labels

    @property
    def label_counts(self) -> Tensor | None:
        """(rows, num_classes) int64: training records of a row under each label, or None.

        Made at every call, and large where there are many labels.
        """
        return self.items.label_counts

    @property
    def captions(self) -> list[str] | None:
        """The most frequent caption of every row, None without captions."""
        return self.items.captions

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None without labels."""
        return self.items.num_classes
