"""Embedding a large dataset with several processes, resumable after a kill."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from memfree.data import DatasetFolder, DatasetPart
from memfree.folders.atomic import remove_temporary, write_atomic
from memfree.folders.lock import WHOLE, Part
from memfree.folders.untrusted import check_plain
from memfree.images import from_bytes
from memfree.retrieval.build import Embedded, content_hashes
from memfree.retrieval.features.base import Features, Whitened, identity, unreadable

_FOLDER = re.compile("[0-9a-f]{16}")  # a ``_digest``


class EmbeddedParts:
    """Embedded batches of a train part, one file each, until the index is written. Batches are
    fixed, so vectors do not depend on the number of processes or on earlier kills."""

    def __init__(
        self, root: Path, features: Features, dataset: DatasetFolder, count: int, batch_size: int
    ) -> None:
        made_of = [identity(features.describe()), dataset.hash, batch_size]
        self.folder = root / _digest(made_of)
        self.count = count
        self.batch_size = batch_size
        self.batches = -(-count // batch_size)

    def rows(self, batch: int) -> range:
        """Positions of a batch's images."""
        start = batch * self.batch_size
        return range(start, min(start + self.batch_size, self.count))

    def path(self, batch: int) -> Path:
        """The file of a batch."""
        return self.folder / f"batch-{batch:08d}.safetensors"

    def missing(self, work: Part = WHOLE) -> list[int]:
        """Batches, of all or of this part, that are not embedded yet."""
        done = {path.name for path in self.folder.glob("batch-*.safetensors")}
        share = work.share(range(self.batches))
        return [batch for batch in share if self.path(batch).name not in done]

    def write(self, batch: int, vectors: Tensor, hashes: list[str]) -> None:
        """Write a batch atomically."""
        digests = np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(-1, 32)
        tensors = {"vectors": vectors.contiguous(), "hashes": torch.from_numpy(digests.copy())}
        write_atomic(self.path(batch), partial(safetensors.torch.save_file, tensors))

    def read(self) -> Embedded:
        """Read all batches in order; ValueError if a file was damaged or replaced."""
        vectors: Tensor | None = None
        hashes: list[str] = []
        for batch in range(self.batches):
            rows, path = self.rows(batch), self.path(batch)
            check_plain(path)
            with unreadable(f"{path} is damaged; delete it and start again"):
                tensors = safetensors.torch.load_file(path)
                part, digests = tensors["vectors"], tensors["hashes"]
                if vectors is None:
                    vectors = torch.empty(self.count, part.shape[1], dtype=torch.float32)
                vectors[rows.start : rows.stop] = part.reshape(len(rows), -1)
                digests = digests.reshape(len(rows), 32)
            hashes += [bytes(digest).hex() for digest in digests.numpy()]
        assert vectors is not None
        return Embedded(vectors, hashes)

    def forget(self) -> None:
        """Remove these parts and those of other extractors for this index, nothing else."""
        root = self.folder.parent
        folders = [path for path in root.glob("*") if _FOLDER.fullmatch(path.name)]
        for folder in (root, *folders):
            remove_temporary(folder)
        for folder in folders:
            for path in folder.glob("batch-*.safetensors"):
                path.unlink(missing_ok=True)
        for path in root.glob("whitening-*.safetensors"):
            path.unlink(missing_ok=True)
        for folder in (*folders, root):
            with contextlib.suppress(OSError):  # not empty: it holds something else
                folder.rmdir()


class EmbeddingModule(LightningModule):
    """Embeds batches and writes them; ``advance`` is called with the size of each."""

    def __init__(
        self, features: Features, parts: EmbeddedParts, advance: Callable[[int], None]
    ) -> None:
        super().__init__()
        self.features = features
        self.parts = parts
        self.advance = advance

    def predict_step(self, batch: tuple[int, Tensor], batch_idx: int = 0) -> int:
        """Embed a batch, its number and images (B, C, H, W) uint8; return the number."""
        number, pixels = batch
        vectors = self.features(from_bytes(pixels)).float().cpu()
        self.parts.write(number, vectors, content_hashes(from_bytes(pixels.cpu())))
        self.advance(len(pixels))
        return number


class MissingBatches(LightningDataModule):
    """The missing batches, a contiguous range for each process."""

    def __init__(self, images: DatasetPart, parts: EmbeddedParts, workers: int, work: Part) -> None:
        super().__init__()
        # On resumption a rank may have nothing left to do.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.images = images
        self.parts = parts
        self.workers = workers
        self.work = work
        self.missing: list[int] = []

    def setup(self, stage: str) -> None:
        """Let rank 0 decide which batches are missing."""
        assert self.trainer is not None
        if self.trainer.is_global_zero:
            self.missing = self.parts.missing(self.work)
        self.missing = self.trainer.strategy.broadcast(self.missing)

    def predict_dataloader(self) -> Iterable[tuple[int, Tensor]]:
        """Batches of this rank."""
        assert self.trainer is not None
        share = np.array_split(self.missing, self.trainer.world_size)[self.trainer.global_rank]
        batches = _Batches(self.images, self.parts, share.astype(int).tolist())
        return DataLoader(dataset=batches, batch_size=None, num_workers=self.workers)


class _Batches(Dataset):
    def __init__(self, part: DatasetPart, parts: EmbeddedParts, numbers: list[int]) -> None:
        self.part = part
        self.parts = parts
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> tuple[int, Tensor]:
        number = self.numbers[position]
        return number, self.part.reader.read(self.parts.rows(number))


def embed(
    images: DatasetPart,
    features: Features,
    parts: EmbeddedParts,
    trainer: Trainer,
    workers: int = 0,
    advance: Callable[[int], None] = lambda count: None,
    work: Part = WHOLE,
) -> None:
    """Embed a train part's missing batches; every process of ``trainer`` calls it."""
    if parts.missing(work):
        trainer.predict(
            EmbeddingModule(features, parts, advance),
            datamodule=MissingBatches(images, parts, workers, work),
            return_predictions=False,
        )
        trainer.strategy.barrier("all batches are embedded")


def whitened(
    dataset: DatasetFolder, features: Features, root: Path, batch_size: int, device: torch.device
) -> Whitened:
    """Whiten an extractor on the fit part. Later processes and resumed runs read the stored
    projection: on some devices a second fit differs."""
    path = root / f"whitening-{_digest([identity(features.describe()), dataset.hash])}.safetensors"
    if path.is_file():
        with unreadable(f"{path} is damaged; delete it and start again"):
            return Whitened.from_tensors(features, safetensors.torch.load_file(path))
    fitted = Whitened.fit(features.to(device), dataset.part("fit").images(), batch_size=batch_size)
    tensors = {name: value.cpu().contiguous() for name, value in fitted.tensors().items()}
    write_atomic(path, partial(safetensors.torch.save_file, tensors))
    return Whitened.from_tensors(features, tensors)


def parts_folder(out: Path) -> Path:
    """Return the hidden folder beside ``out`` that holds the parts of its index."""
    out = out.resolve()
    return out.parent / f".{out.name}.parts"


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
