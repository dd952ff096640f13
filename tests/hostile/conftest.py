"""Whole folders of every kind, one of each to be spoilt by a test in a copy."""

import json
import shutil

import pytest
import tiny_pipelines
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from pyarrow import parquet

from memfree import images
from memfree.commands.prepare import prepare
from memfree.data import DuplicationPlan, PartSizes
from memfree.evaluation.metrics import HELDOUT
from memfree.folders.manifest import write_manifest
from memfree.guidance import calibrate
from memfree.guidance.calibration import default_similarity
from memfree.models import NetworkOptions, export_model
from memfree.models.ddpm import build_network
from memfree.models.module import CHECKPOINT_KEY
from memfree.retrieval import ReferenceIndex
from memfree.sampling.writer import trace_table, write_shard
from memfree.training.checkpoints import AtomicCheckpointIO

SHAPE = (1, 4, 4)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A folder of whole folders: data, index, model, pipe, samples, evaluation, checkpoints."""
    root = tmp_path_factory.mktemp("whole")
    prepare(
        root / "data",
        parts=PartSizes(train=20, calibration=20, test=5, fit=5),
        plan=DuplicationPlan(images=2, factor=3),
    )
    _index().save(root / "index")
    _model(root / "model")
    tiny_pipelines.stable_diffusion().save_pretrained(root / "pipe")
    _samples(root / "samples")
    _evaluation(root / "evaluation")
    checkpoint = {CHECKPOINT_KEY: {"a": 1}, "state_dict": {"weight": torch.ones(300)}}
    path = root / "checkpoints" / "step-00000002.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    return root


@pytest.fixture
def copy(whole, tmp_path):
    """A function that copies one of the whole folders."""

    def copied(name):
        return shutil.copytree(whole / name, tmp_path / name)

    return copied


def _images(count, seed=1):
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _index():
    index = ReferenceIndex.build(
        _images(12),
        labels=torch.arange(12) % 3,
        captions=[f"caption {i}" for i in range(12)],
    )
    calibrate(index, default_similarity(index), _images(500, 2))
    return index


def _model(folder):
    options = NetworkOptions([8, 8], [False, True], 1, 4, 4)
    network = build_network(options, SHAPE, 3)
    pipeline = DDPMPipeline(network, DDPMScheduler(num_train_timesteps=50))
    export_model(folder, pipeline, 0, image_shape=list(SHAPE), num_classes=3)


def _samples(folder):
    folder.mkdir()
    records = [{"index": i, "seed": 5, "condition": i % 3, "seconds": 0.5} for i in range(6)]
    write_shard(folder / "samples-000-000000.tar", records, images.to_bytes(_images(6)))
    step = torch.arange(4).repeat(6)
    columns = {
        "sample": torch.arange(6).repeat_interleave(4),
        "step": step,
        "t": 1000 - 200 * step,
        "sigma": -1.5 + 0.2 * step,
        "lambda": -1.0 + 0.05 * step,
        "active": step == 3,
    }
    table = trace_table(torch.arange(6), columns, None)
    parquet.write_table(table, folder / "trace-000-000000.parquet")
    write_manifest(
        folder,
        "samples",
        5,
        count=6,
        image_shape=list(SHAPE),
        shards=["samples-000-000000.tar"],
        files={path.name: path.stat().st_size for path in folder.iterdir()},
        mitigation="none",
        seconds_per_sample=0.1,
    )


def _evaluation(folder):
    folder.mkdir()
    made = {"manifest": {"made_by": {"command": ["x"]}, "count": 6, "image_shape": list(SHAPE)}}
    rate = {"value": 0.5, "low": 0.4, "high": 0.6, "count": 6}
    detail = {"threshold": -1.0, "false_positive_rate": 0.01}
    metrics = [
        {"metric": "copies", "subject": name, **rate, "detail": detail} for name in ("a", HELDOUT)
    ]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    picture = {"column": 0, "sample": 0, "key": "k", "multiplicity": 2}
    picture["png"] = images.to_png(images.to_bytes(_images(1)[0]))
    verdicts = [
        {"subject": "a", "sigma": -1.0, "copy": True},
        {"subject": None, "sigma": None, "copy": None},
    ]
    quantiles = {f"q{percent}": -1.0 for percent in (10, 25, 50, 75, 90)}
    trajectory = {"subject": "a", "group": "copies", "step": 0, "t": 9.0, "lambda": -1.0}
    for name, rows in {
        "pictures": [{**picture, **verdict} for verdict in verdicts],
        "trajectories": [{**trajectory, **quantiles}],
        "per_sample": [{"subject": name, "sigma": -1.0} for name in ("a", HELDOUT)],
    }.items():
        parquet.write_table(_table(rows), folder / f"{name}.parquet")
    write_manifest(
        folder,
        "evaluation",
        0,
        reference="a",
        samples={"a": {**made, "model": None}},
        paired={},
        dataset={**made, "hash": "h"},
        index=made,
        false_positive_rate=0.01,
    )


def _table(rows):
    import pyarrow as pa

    return pa.Table.from_pylist(rows)
