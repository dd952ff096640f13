"""Sample folders of given images, as sample.py would have left them."""

from pathlib import Path

import torch
from pyarrow import parquet

from memfree.folders.manifest import write_manifest
from memfree.images import to_bytes
from memfree.sampling.writer import trace_table, write_shard

COUNT, STEPS = 60, 5


def make_samples(
    folder: Path,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    dataset_hash: str | None,
    mitigation: str,
    seed: int = 0,
    trace: bool = True,
    index_features: str | None = None,
    captions: list[str] | None = None,
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
            **({} if captions is None else {"condition": captions[i]}),
        }
        for i in range(n)
    ]
    write_shard(folder / "samples-000-000000.tar", records, to_bytes(images))
    if trace:
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
        index_features=index_features,
        dataset_hash=dataset_hash,
        seconds_per_sample=0.01,
        peak_memory_bytes=3e8,
        steps=STEPS,
    )
    return folder
