"""Real digits with declared duplicates, an index of them, and sample folders made up by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from made_samples import COUNT, make_samples

from memfree.commands.evaluate import evaluate
from memfree.commands.prepare import prepare
from memfree.data import DatasetFolder, DuplicationPlan
from memfree.guidance import NormalizedL2, calibrate
from memfree.retrieval import ReferenceIndex


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


@pytest.fixture(scope="session")
def samples(dataset, tmp_path_factory) -> dict[str, Path]:
    """``unguided``: half are copies of duplicated images; ``amg``: held-out digits instead."""
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


@pytest.fixture(scope="session")
def evaluation(dataset, index, samples, tmp_path_factory) -> Path:
    """``samples`` measured, as ``memfree evaluate`` leaves it."""
    out = tmp_path_factory.mktemp("evaluation") / "evaluation"
    evaluate(dataset, index, samples, out)
    return out
