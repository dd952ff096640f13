"""Rows of a reference index: their columns, and the search for the nearest ones."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from memfree.retrieval.features.base import Features, Metric
from memfree.retrieval.items import Items
from memfree.retrieval.search import Groups, Hits, References


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


Backend = Literal["auto", "torch", "faiss"]
_SMALL = 1 << 29
"""Elements of the vectors (2 GB) up to which a CPU keeps a second, centred copy of them."""


class Searched(Rows):
    """Rows with their vectors, searched by group; the search is prepared at its first use.

    Attributes:
        vectors: (rows, D) float32, possibly memory-mapped; of length 1 for ``cosine``.
        image_shape: (C, H, W) of the images.
        backend: ``torch`` (matrix products on the index's device; ``auto`` is the same) or
            ``faiss``, which keeps a copy of the vectors and is slower on a CPU. Results are equal.
    """

    def __init__(
        self,
        vectors: Tensor,
        features: Features,
        items: Items,
        image_shape: tuple[int, int, int],
        dataset_hash: str | None = None,
        calibrations: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        self.vectors = vectors
        self.features = features
        self.items = items
        self.image_shape = image_shape
        self.dataset_hash = dataset_hash
        self.calibrations = calibrations if calibrations is not None else {}
        self.backend: Backend = "auto"
        self._references: References | None = None
        self._faiss: Any = None

    def __len__(self) -> int:
        """Number of rows: distinct images."""
        return len(self.vectors)

    @property
    def device(self) -> torch.device:
        """Where the index is searched."""
        return self.vectors.device

    def _move_vectors(self, device: torch.device) -> None:
        """Move the vectors; what was prepared for search is prepared again there."""
        if device != self.vectors.device:
            self.vectors = self.vectors.to(device)
            self._references = self._faiss = None

    @property
    def references(self) -> References:
        """Vectors prepared for search: centred, with norms and groups; made at the first use."""
        if self._references is None:
            small = self.vectors.numel() <= _SMALL or self.device.type != "cpu"
            keep_centred = small and self.backend != "faiss"
            self._references = References(
                self.vectors, Groups.of(self.group), self.metric, keep_centred
            )
        return self._references

    @torch.no_grad()
    def search(self, queries: Tensor, k: int) -> Hits:
        """Find the nearest member of each of the k nearest distinct groups.

        Args:
            queries: vectors (B, D), or images (B, C, H, W) in [-1, 1], which are embedded first.
            k: number of groups to find, at most as many as there are.

        Returns:
            rows and scores, best first, on the index's device: L2 distances or cosine
            similarities, exact to float32; of equal scores the lower row comes first.

        Raises:
            ValueError: k is not in 1 … number of groups, or the queries have another shape or are
                not finite.
        """
        references = self.references
        if not 1 <= k <= references.groups.count:
            raise ValueError(
                f"cannot find k={k} neighbours: the index has {references.groups.count} distinct "
                f"groups, so k must be in 1 … {references.groups.count}"
            )
        vectors = self._query_vectors(queries)
        if self.backend != "faiss":
            return references.search(vectors, k)
        if self._faiss is None:
            from memfree.retrieval.search import FaissReferences

            self._faiss = FaissReferences(references)
        return self._faiss.search(vectors, k)

    def _query_vectors(self, queries: Tensor) -> Tensor:
        queries = queries.detach().to(self.device)
        if queries.ndim == 4:
            if tuple(queries.shape[1:]) != tuple(self.image_shape):
                raise ValueError(
                    f"queries are images of shape {tuple(queries.shape[1:])}, but the index is "
                    f"of images of shape {tuple(self.image_shape)}"
                )
            queries = self.features(queries)
        if queries.ndim != 2 or queries.shape[1] != self.vectors.shape[1]:
            raise ValueError(
                f"queries have shape {tuple(queries.shape)}, but the index needs vectors "
                f"(B, {self.vectors.shape[1]}) or images (B, C, H, W) of {tuple(self.image_shape)}"
            )
        queries = queries.to(torch.float32)
        if self.metric == "cosine":
            queries = torch.nn.functional.normalize(queries, dim=1)
        return queries
