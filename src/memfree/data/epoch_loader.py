"""Training batches of one epoch after another, from where the trainer stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from memfree.data.rank_batches import Batch, RankBatches


class EpochLoader:
    """A loader that asks which epoch it is, and where in it training stands.

    Args:
        epochs: the batches of this rank.
        num_workers: processes that decode; 0 decodes in this one.
        position: gives (epoch, batches of it that were trained on).
        count: takes each batch before it is handed out.
    """

    def __init__(
        self,
        epochs: RankBatches,
        num_workers: int,
        position: Callable[[], tuple[int, int]],
        count: Callable[[Batch], None],
    ) -> None:
        self.epochs = epochs
        self._position, self._count = position, count
        self._loader: DataLoader[Batch | Exception] = DataLoader(
            _WithErrors(epochs),
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __len__(self) -> int:
        return self.epochs.batches

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the present epoch.

        Lightning asks for an iterator long before it asks for its first batch, so the position is
        looked up with that one.
        """
        self.epochs.epoch, self.epochs.start = self._position()
        for batch in self._loader:
            if isinstance(batch, Exception):
                raise batch
            self._count(batch)
            yield batch

    @property
    def _iterator(self) -> Any:
        """The workers, under the name by which Lightning finds and ends them after training."""
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self._loader._iterator = value

    def state_dict(self) -> dict[str, Any]:
        """Empty: the position is the trainer's. Tells Lightning that this loader can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


class _WithErrors(IterableDataset["Batch | Exception"]):
    """Batches, and the error that ends them: raised in a worker, it would be text of many lines."""

    def __init__(self, epochs: RankBatches) -> None:
        self._epochs = epochs

    def __iter__(self) -> Iterator[Batch | Exception]:
        try:
            yield from self._epochs
        except (ValueError, OSError) as error:
            yield error
