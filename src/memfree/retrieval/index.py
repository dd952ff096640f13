"""ReferenceIndex: distinct training images, searchable, with counts, labels and captions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional

from memfree.data.duplicates import group as connected
from memfree.data.duplicates import numbered
from memfree.retrieval import index_folder
from memfree.retrieval.build import (
    Condition,
    Embedded,
    Origin,
    assemble,
    content_hashes,
    embedded,
    joined_by_copies,
    merged,
    near_copies,
)
from memfree.retrieval.features.base import Features, Metric, PixelFeatures
from memfree.retrieval.items import CONDITIONS, Items, duplicated_captions
from memfree.retrieval.options import CaptionPolicy
from memfree.retrieval.search import FaissReferences, Groups, Hits, References

if TYPE_CHECKING:
    from memfree.data import DatasetFolder

Backend = Literal["auto", "torch", "faiss"]
_SMALL = 1 << 29
"""Vector elements (2 GB) up to which a CPU keeps a second, centred copy."""


class ReferenceIndex:
    """Feature vectors of distinct training images, searched by group.

    Create it with ``build`` or ``load``. Rows are distinct images with their number of copies; rows
    of a group (near copies, declared or found) count as one neighbour. Search is not
    differentiable: take gradients through ``features(images)`` and ``vectors[hits.rows]``.

    Attributes:
        vectors: (rows, D) float32, possibly memory-mapped; of length 1 for ``cosine``.
        image_shape: (C, H, W) of the images.
        dataset_hash: hash of the dataset folder, None for an index of bare tensors.
        calibrations: by similarity name, JSON that ``memfree.guidance.calibrate`` stores here.
        backend: ``torch`` (same as ``auto``) or ``faiss``, which keeps a copy of the vectors and is
            slower on a CPU. Results are equal.
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
        self._faiss: FaissReferences | None = None

    @classmethod
    def build(
        cls,
        images: Tensor | DatasetFolder | Path | str,
        features: Features | None = None,
        captions: Sequence[str] | None = None,
        labels: Tensor | None = None,
        groups: Sequence[object] | Tensor | None = None,
        counts: Tensor | None = None,
        keys: Sequence[str] | None = None,
        num_classes: int | None = None,
        batch_size: int = 256,
        advance: Callable[[int], None] | None = None,
    ) -> ReferenceIndex:
        """Index images; identical ones become one row that adds up counts and conditions.

        Args:
            images: (N, C, H, W), finite, in [-1, 1]; or a dataset folder, whose train part has its
                own keys, groups, counts, labels and captions.
            features: the extractor; None: ``PixelFeatures()``.
            labels: (N,) int64 class of every image.
            groups: group of every image, hashable values or a (N,) tensor. None: near copies are
                found by their pixels, as ``memfree prepare`` does (``data.duplicates.near_pairs``).
            counts: (N,) int64 training records of every image; None: 1 each.
            keys: name of every image; None: ``image-00000000`` and so on.
            num_classes: None: the highest label + 1.
            advance: called with the number of images of every finished batch.
        """
        features = features if features is not None else PixelFeatures()
        if isinstance(images, Tensor):
            origin = Origin.of_images(images, keys, groups, counts, labels, captions, num_classes)
        else:
            given = [keys, groups, counts, labels, captions, num_classes]
            if any(value is not None for value in given):
                raise ValueError(
                    "a dataset folder has its own keys, groups, counts, labels and captions: "
                    "give images only"
                )
            if isinstance(images, (str, Path)):
                from memfree.data import DatasetFolder

                images = DatasetFolder(Path(images))
            origin = Origin.of_dataset(images)
        images_of_origin, image_shape = embedded(origin, features, batch_size, advance)
        vectors, items = assemble(origin, images_of_origin, batch_size)
        return cls(vectors, features.cpu(), items, image_shape, origin.dataset_hash)

    @classmethod
    def of_embedded(
        cls, dataset: DatasetFolder, features: Features, images: Embedded
    ) -> ReferenceIndex:
        """Index a dataset's train part that is already embedded (``retrieval.embed``)."""
        vectors, items = assemble(Origin.of_dataset(dataset), images, batch_size=256)
        return cls(vectors, features.cpu(), items, dataset.image_shape, dataset.hash)

    def __len__(self) -> int:
        """Number of rows: distinct images."""
        return len(self.vectors)

    @property
    def device(self) -> torch.device:
        """Where the index is searched."""
        return self.vectors.device

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
        """(rows,) int64 training records of exactly that image."""
        return self.items.multiplicity

    @property
    def group_multiplicity(self) -> Tensor:
        """(rows,) int64 training records of the row's whole group."""
        return self.items.group_multiplicity

    @property
    def labels(self) -> Tensor | None:
        """(rows,) int64 most frequent label of every row, None without labels."""
        return self.items.labels

    @property
    def label_counts(self) -> Tensor | None:
        """(rows, num_classes) int64 records of a row by label, or None; computed at every call."""
        return self.items.label_counts

    @property
    def captions(self) -> list[str] | None:
        """The most frequent caption of every row, None without captions."""
        return self.items.captions

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None without labels."""
        return self.items.num_classes

    def to(self, device: torch.device | str) -> ReferenceIndex:
        """Move the index and its extractor to a device; return itself."""
        device = torch.device(device)
        if device != self.vectors.device:
            self.vectors = self.vectors.to(device)
            self._references = self._faiss = None
        self.items.to(device)
        self.features.to(device)
        return self

    @property
    def references(self) -> References:
        """Vectors prepared for search: centred, with norms and groups; built at first use."""
        if self._references is None:
            small = self.vectors.numel() <= _SMALL or self.device.type != "cpu"
            keep_centred = small and self.backend != "faiss"
            self._references = References(
                self.vectors, Groups.of(self.group), self.metric, keep_centred
            )
        return self._references

    @torch.no_grad()
    def search(self, queries: Tensor, k: int) -> Hits:
        """Find the nearest member of each of the k nearest distinct groups, for finite vectors (B,
        D) or images (B, C, H, W) in [-1, 1], which are embedded first. Hits are on the index's
        device, best first, and exact to float32; of equal scores the lower row comes first."""
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
        return functional.normalize(queries, dim=1) if self.metric == "cosine" else queries

    def images(self, rows: Tensor) -> Tensor:
        """The images (len(rows), C, H, W) in [-1, 1] of rows; only of an index of pixels."""
        if not isinstance(self.features, PixelFeatures):
            raise ValueError(
                f"an index of {self.features.describe()['name']} features holds no images; "
                "use one of pixels"
            )
        return self.vectors[rows.to(self.device)].reshape(len(rows), *self.image_shape)

    def duplicated_caption(
        self, rows: Tensor, policy: CaptionPolicy = "nearest", m: int = 20
    ) -> list[str]:
        """Caption that each query may copy; see ``items.duplicated_captions``."""
        return duplicated_captions(self.items, rows, policy, m)

    def add(
        self,
        images: Tensor,
        captions: Sequence[str] | None = None,
        labels: Tensor | None = None,
        groups: Sequence[object] | Tensor | None = None,
        counts: Tensor | None = None,
        keys: Sequence[str] | None = None,
        batch_size: int = 256,
    ) -> ReferenceIndex:
        """Return a new index with more images, which must be calibrated again. An indexed image
        adds to its row's multiplicity and conditions; others become rows at the end.

        Args:
            images: (N, C, H, W) in [-1, 1], of the index's shape.
            captions, labels, counts: as in ``build``; labels exactly if the index has labels.
            groups: group of every image; a value may be the key of an indexed image. None: near
                copies are found by their pixels, in an index of pixels among the old images too.
            keys: name of every image; None: free numbers.

        Raises:
            ValueError: as in ``build``, a key stands for another image, or the index does not know
                its own images (its keys are hashed, or an older version wrote it).
        """
        if (labels is None) != (self.num_classes is None):
            raise ValueError(
                "the index has no labels, so images with labels cannot be added"
                if labels is not None
                else "the index has labels: give the labels of the images to add"
            )
        if keys is None:
            keys = _free_keys(self.keys, len(images))
        more = Origin.of_images(images, keys, groups, counts, labels, captions, self.num_classes)
        if tuple(images.shape[1:]) != tuple(self.image_shape):
            raise ValueError(
                f"images to add are {tuple(images.shape[1:])}, but the index is of images "
                f"{tuple(self.image_shape)}"
            )
        hashes = self._contents() + content_hashes(images)
        row = numbered(hashes)
        old = len(self)
        row_of_key = {key: number for number, key in reversed(list(enumerate(self.keys)))}
        for key, number in zip(keys, row[old:].tolist(), strict=True):
            if row_of_key.setdefault(key, number) != number:
                raise ValueError(f"key {key!r} already stands for another image")
        # New rows are numbered after the old ones, in the order of their first image.
        new = torch.from_numpy(np.unique(row, return_index=True)[1][old:] - old)
        group = joined_by_copies(row, self._group_names(more))
        if groups is None and len(new):
            group = connected(len(group), self._near(images[new]), group.tolist())
        vectors = self.vectors.cpu()
        if len(new):
            fresh = self.features.embed(images[new].to(self.device), batch_size).cpu()
            vectors = torch.cat([vectors, fresh])
        return self._changed(
            vectors, merged(self._with(more), row, group, hashes), "images were added"
        )

    def _contents(self) -> list[str]:
        if isinstance(self.features, PixelFeatures):
            parts = self.vectors.split(4096)
            shaped = (part.reshape(len(part), *self.image_shape) for part in parts)
            return [digest for part in shaped for digest in content_hashes(part)]
        contents = [content for content in self.items.contents if content is not None]
        if len(contents) < len(self):
            raise ValueError(
                "this index does not know which images it holds (its keys are hashed, or an older "
                "version wrote it): add to the index that it was made from, or build it again"
            )
        return contents

    def _group_names(self, more: Origin) -> list[object]:
        old = [("indexed", number) for number in self.group.tolist()]
        if more.groups is None:
            return [*old, *(("alone", position) for position in range(len(more.keys)))]
        of_key = dict(zip(self.keys, old, strict=True))
        return [*old, *(of_key.get(str(name), ("declared", name)) for name in more.groups)]

    def _near(self, images: Tensor) -> np.ndarray:
        if not isinstance(self.features, PixelFeatures):  # the old images are not known
            return near_copies(images) + len(self)
        old = self.vectors.cpu().reshape(-1, *self.image_shape)
        return near_copies(torch.cat([old, images.cpu().float()]), since=len(self))

    def _with(self, more: Origin) -> Origin:
        items, old = self.items, len(self)
        names = ("row", "label", "caption", "count")
        columns = [items.conditions[name].to_pylist() for name in names]
        conditions: list[Condition] = list(zip(*columns, strict=True))
        conditions += [(row + old, *rest) for row, *rest in more.conditions]  # type: ignore[misc]
        return Origin(
            batches=more.batches,
            keys=[*items.keys, *more.keys],
            counts=torch.cat([items.multiplicity.cpu(), more.counts]),
            groups=None,
            conditions=conditions,
            num_classes=self.num_classes,
            shards=[*items.shards, *more.shards],
        )

    def remove(self, keys: Iterable[str]) -> ReferenceIndex:
        """Return a new index without images of these keys and their copies, as for opt-outs. Other
        rows of their groups stay together. The new index must be calibrated again."""
        gone = {keys} if isinstance(keys, str) else set(keys)
        if unknown := gone - set(self.keys):
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise ValueError(f"the index has no image {min(unknown)!r}{more}; nothing was removed")
        kept = [row for row, key in enumerate(self.keys) if key not in gone]
        if not kept:
            raise ValueError("this would remove all images of the index; an index cannot be empty")
        rows, items = torch.tensor(kept), self.items
        position = {row: place for place, row in enumerate(kept)}
        of_table = items.conditions["row"].to_pylist()
        table = items.conditions.filter(pa.array([row in position for row in of_table], pa.bool_()))
        numbers = [position[row] for row in of_table if row in position]
        rest = Items(
            [items.keys[row] for row in kept],
            torch.from_numpy(numbered(items.group.cpu()[rows].tolist())),
            items.multiplicity.cpu()[rows],
            table.set_column(0, CONDITIONS.field("row"), pa.array(numbers, pa.int64())),
            self.num_classes,
            [items.shards[row] for row in kept],
            [items.contents[row] for row in kept],
        )
        return self._changed(self.vectors.cpu()[rows], rest, "images were removed")

    def _changed(self, vectors: Tensor, items: Items, why: str) -> ReferenceIndex:
        # Other references have other distances: thresholds may have moved.
        stale = {name: {"similarity": name, "stale": why} for name in self.calibrations}
        changed = ReferenceIndex(vectors, self.features, items, self.image_shape, None, stale)
        changed.backend = self.backend
        return changed.to(self.device)

    def hashed(
        self, salt: str, keep_captions: bool = False, keep_shards: bool = False
    ) -> ReferenceIndex:
        """Return a new index that names no image, for parties who may not hold them. Keys become
        ``index_folder.hashed_key``; images cannot be added.

        Args:
            salt: 16 characters or more, kept by the owner, who traces hits with it and the keys.
            keep_captions: keep the captions, which may name people.
            keep_shards: keep the names of the shards.

        Raises:
            ValueError: the salt is short, or images can be decoded from the vectors (pixels,
                latents).
        """
        items = index_folder.hashed(self.items, self.features, salt, keep_captions, keep_shards)
        parts = replace(self._stored(), items=items, calibrations=dict(self.calibrations))
        return ReferenceIndex(**vars(parts)).to(self.device)

    def save(self, folder: Path | str, overwrite: bool = False) -> None:
        """Write the index folder in one step; see ``index_folder.save``."""
        index_folder.save(self._stored(), Path(folder), overwrite)

    def _stored(self) -> index_folder.Stored:
        names = [field.name for field in fields(index_folder.Stored)]
        return index_folder.Stored(**{name: getattr(self, name) for name in names})

    def save_calibrations(self, folder: Path | str) -> None:
        """Replace only the calibrations in the index's own folder."""
        index_folder.save_calibrations(Path(folder), self.calibrations)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        weights: Path | str | None = None,
        trust_file: bool = False,
        verify: bool = True,
    ) -> ReferenceIndex:
        """Open an index folder, vectors memory-mapped; see ``index_folder.load``."""
        place = None if weights is None else Path(weights)
        return cls(**vars(index_folder.load(Path(folder), place, trust_file, verify)))


def _free_keys(taken: list[str], count: int) -> list[str]:
    known = set(taken)
    free = (key for n in itertools.count(len(taken)) if (key := f"image-{n:08d}") not in known)
    return list(itertools.islice(free, count))
