"""Real digits with declared duplicates, an index of them, and sample folders made up by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

from memfree.data import DatasetFolder, DuplicationPlan, prepare
from memfree.guidance import NormalizedL2, calibrate
from memfree.manifest import write_manifest
from memfree.retrieval import ReferenceIndex
from memfree.sampling import png
from memfree.sampling.writer import trace_table, write_shard

COUNT, STEPS = 60, 5


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "dataset"
    prepare(out, plan=DuplicationPlan(images=16, factor=64), seed=1)
    return out


@pytest.fixture(scope="session")
def index(dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("index") / "index"
    built = ReferenceIndex.build(dataset)
    calibrate(built, NormalizedL2(), DatasetFolder(dataset).part("calibration").images())
    built.save(out)
    return out


def make_samples(
    folder: Path,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    dataset_hash: str | None,
    mitigation: str,
    seed: int = 0,
    trace: bool = True,
) -> Path:
    """A finished sample folder of given images, with a trace that rises towards the end."""
    n = len(images)
    folder.mkdir(parents=True)
    records = [
        {
            "index": i,
            "seed": seed,
            "condition": None if labels is None else int(labels[i]),
            "mitigation": mitigation,
        }
        for i in range(n)
    ]
    write_shard(folder / "samples-000-000000.tar", records, png.to_bytes(images))
    if trace:
        from pyarrow import parquet

        step = torch.arange(STEPS).repeat(n)
        columns = {
            "sample": torch.arange(n).repeat_interleave(STEPS),
            "step": step,
            "t": 1000 - 200 * step,
            "sigma": -1.5 + 0.2 * step + 0.1 * torch.arange(n).repeat_interleave(STEPS) / n,
            "lambda": -1.0 + 0.05 * step,
            "active": step == STEPS - 1,
        }
        table = trace_table(torch.arange(n), columns, None)
        parquet.write_table(table, folder / "trace-000-000000.parquet")
    write_manifest(
        folder,
        "samples",
        seed,
        count=n,
        image_shape=list(images.shape[1:]),
        shards=["samples-000-000000.tar"],
        mitigation=mitigation,
        dataset_hash=dataset_hash,
        seconds_per_sample=0.01,
        peak_memory_bytes=3e8,
        steps=STEPS,
    )
    return folder


@pytest.fixture(scope="session")
def samples(dataset, tmp_path_factory) -> dict[str, Path]:
    """``unguided``: half are copies of duplicated images; ``amg``: all are held-out digits of the same classes."""
    data = DatasetFolder(dataset)
    train, fit, guided = data.part("train"), data.part("fit"), data.part("calibration")
    root = tmp_path_factory.mktemp("samples")
    generator = torch.Generator().manual_seed(0)
    duplicated = torch.nonzero(train.copies > 1).flatten()
    copied = duplicated[torch.arange(COUNT // 2) % len(duplicated)]
    rows = torch.from_numpy(np.random.default_rng(0).permutation(len(fit.keys))[:COUNT])
    noise = 0.02 * torch.randn(COUNT // 2, 1, 8, 8, generator=generator)
    # Held-out digits of the same classes stand for guided samples.
    classes = torch.cat([train.labels[copied], fit.labels[rows[: COUNT // 2]]])
    twins = [
        int(torch.nonzero(guided.labels == c).flatten()[i % 40]) for i, c in enumerate(classes)
    ]
    copies = (train.images()[copied] + noise).clamp(-1, 1)
    others = fit.images()[rows[: COUNT // 2]]
    return {
        "unguided": make_samples(
            root / "unguided", torch.cat([copies, others]), classes, data.hash, "none"
        ),
        "amg": make_samples(root / "amg", guided.images()[twins], classes, data.hash, "amg"),
    }
