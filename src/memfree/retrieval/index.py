"""ReferenceIndex: distinct training images, searchable, with counts, labels and captions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memfree.retrieval import index_folder
from memfree.retrieval.build import Embedded, added, assemble, embedded, removed
from memfree.retrieval.features.base import Features, PixelFeatures
from memfree.retrieval.items import Items, Origin, duplicated_captions
from memfree.retrieval.options import CaptionPolicy
from memfree.retrieval.rows import Searched

if TYPE_CHECKING:
    from memfree.data import DatasetFolder


class ReferenceIndex(Searched):
    """Feature vectors of distinct training images, searched by group.

    Made by ``build`` or ``load``. Rows are distinct images; copies of an image are one row with
    their number beside it. Rows of the same group (near copies, declared or found) count as one
    neighbour. Neither search nor storage is differentiable: take gradients through
    ``features(images)`` and ``vectors[hits.rows]``.

    Attributes:
        vectors: (rows, D) float32, possibly memory-mapped; of length 1 for ``cosine``.
        features: the extractor of the vectors.
        items: keys, groups, multiplicities and conditions of the rows.
        image_shape: (C, H, W) of the images.
        dataset_hash: hash of the dataset folder, None for an index of bare tensors.
        calibrations: by similarity name, JSON that ``memfree.guidance.calibrate`` stores here.
        backend: what searches; see ``Searched``.
    """

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
        """Index images; identical ones become one row, their counts and conditions are added up.

        Args:
            images: (N, C, H, W) in [-1, 1]; or a dataset folder, whose train part is indexed with
                its own keys, groups, copies and conditions (the arguments below are then refused).
            features: what images are compared by; None: ``PixelFeatures()``.
            captions: caption of every image.
            labels: (N,) int64 class of every image.
            groups: group of every image, any hashable values or a (N,) tensor: images of the same
                group count as one neighbour. None: near copies are found by their pixels (see
                ``grouping.near_copies``).
            counts: (N,) int64 training records of every image; None: 1 each.
            keys: name of every image; None: ``image-00000000`` and so on.
            num_classes: number of classes; None: the highest label + 1.
            batch_size: images to embed at a time.
            advance: called with the number of images of every batch that is done.

        Raises:
            ValueError: the images are not (N, C, H, W), empty, not finite or outside [-1, 1], or
                an argument does not have one entry an image.
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
            origin = Origin.of_dataset(_opened(images))
        images_of_origin, image_shape = embedded(origin, features, batch_size, advance)
        vectors, items = assemble(origin, images_of_origin, batch_size)
        return cls(vectors, features.cpu(), items, image_shape, origin.dataset_hash)

    @classmethod
    def of_embedded(
        cls, dataset: DatasetFolder, features: Features, images: Embedded
    ) -> ReferenceIndex:
        """Index a dataset's train part that was embedded before (``retrieval.embedding``)."""
        origin = Origin.of_dataset(dataset)
        vectors, items = assemble(origin, images, batch_size=256)
        return cls(vectors, features.cpu(), items, dataset.image_shape, dataset.hash)

    def to(self, device: torch.device | str) -> ReferenceIndex:
        """Move the index and its extractor to a device; returns itself."""
        device = torch.device(device)
        self._move_vectors(device)
        self.items.to(device)
        self.features.to(device)
        return self

    def images(self, rows: Tensor) -> Tensor:
        """The images (len(rows), C, H, W) in [-1, 1] of some rows.

        Raises:
            ValueError: the index holds features from which images cannot be had.
        """
        if not isinstance(self.features, PixelFeatures):
            raise ValueError(
                f"an index of {self.features.describe()['name']} features holds no images; "
                "use one of pixels"
            )
        return self.vectors[rows.to(self.device)].reshape(len(rows), *self.image_shape)

    def duplicated_caption(
        self, rows: Tensor, policy: CaptionPolicy = "nearest", m: int = 20
    ) -> list[str]:
        """Caption of what each query (rows: (B, k)) may copy; see ``captions``."""
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
        """A new index with more images; this one, and guidances that hold it, stay as they are.

        An image that is indexed already adds to its row's multiplicity and conditions; others
        become rows at the end. Thresholds may have moved, so the new index must be calibrated
        again, and it is no longer of the dataset folder that this one is of.

        Args:
            images: (N, C, H, W) in [-1, 1], of the index's shape.
            captions, labels, counts: as in ``build``; labels just if the index has labels.
            groups: group of every image: equal values belong together, and with the indexed image
                whose key they are. None: near copies are found by their pixels, among the new
                images, and in an index of pixels among the old ones too.
            keys: name of every image; None: free numbers.
            batch_size: images to embed at a time.

        Raises:
            ValueError: as in ``build``, a key stands for another image, or the index does not know
                its own images (its keys are hashed, or an older version wrote it).
        """
        more = added(self, images, captions, labels, groups, counts, keys, batch_size)
        return self._changed(*more, "images were added")

    def remove(self, keys: Iterable[str]) -> ReferenceIndex:
        """A new index without the images of these keys, as for opt-outs; this one stays as it is.

        A row goes with all its copies. Other rows of its group stay, and stay together. Thresholds
        may have moved, so the new index must be calibrated again.

        Raises:
            ValueError: a key is unknown, or no image would be left.
        """
        return self._changed(*removed(self, keys), "images were removed")

    def _changed(self, vectors: Tensor, items: Items, why: str) -> ReferenceIndex:
        # Other references have other distances: thresholds may have moved.
        stale = {name: {"similarity": name, "stale": why} for name in self.calibrations}
        changed = ReferenceIndex(vectors, self.features, items, self.image_shape, None, stale)
        changed.backend = self.backend
        return changed.to(self.device)

    def hashed(
        self, salt: str, keep_captions: bool = False, keep_shards: bool = False
    ) -> ReferenceIndex:
        """A new index that names no image, for parties who may not hold them.

        It has the embeddings, groups, counts, labels and calibrations; each key is replaced by
        ``index_folder.hashed_key`` of it. Images cannot be added to it.

        Args:
            salt: 16 characters or more that the owner of the images keeps; with it and the list of
                keys a hit is traced back.
            keep_captions: keep the captions, which may name people.
            keep_shards: keep the names of the shards.

        Raises:
            ValueError: the salt is short, or images can be had from the vectors (pixels, latents).
        """
        return ReferenceIndex(
            self.vectors,
            self.features,
            index_folder.hashed(self, salt, keep_captions, keep_shards),
            self.image_shape,
            self.dataset_hash,
            dict(self.calibrations),
        ).to(self.device)

    def save(self, folder: Path | str, overwrite: bool = False) -> None:
        """Write the index folder in one step; see ``index_folder.save``."""
        index_folder.save(self, Path(folder), overwrite)

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
        return cls(*index_folder.load(Path(folder), place, trust_file, verify))


def _opened(dataset: DatasetFolder | Path | str) -> DatasetFolder:
    if isinstance(dataset, (str, Path)):
        from memfree.data import DatasetFolder

        return DatasetFolder(Path(dataset))
    return dataset
