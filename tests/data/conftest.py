"""Small dataset folders and foreign shards for the tests of this package."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from memfree.commands.prepare import prepare
from memfree.data import DuplicationPlan, PartSizes

SMALL = PartSizes(train=60, calibration=40, test=30, fit=20)


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory):
    """60 training digits, 4 of them 8 times, in shards of 20: 88 records. Do not change it."""
    out = tmp_path_factory.mktemp("data") / "digits"
    plan = DuplicationPlan(images=4, factor=8)
    prepare(out, parts=SMALL, plan=plan, records_per_shard=20)
    return out


def encoded(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    """An image file of (H, W) or (H, W, 3) uint8 pixels."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar of (name, content)."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def img2dataset_shard(folder: Path, number: int, count: int, size: int = 12) -> Path:
    """A shard as img2dataset writes it: JPEG, caption and JSON, keys of nine digits."""
    generator = np.random.default_rng(number)
    members = []
    for position in range(count):
        key = f"{number:05d}{position:04d}"
        image = encoded(generator.integers(0, 255, (size, size + 2, 3)).astype(np.uint8), "JPEG")
        meta = {"caption": f"picture {key}", "key": key, "status": "success", "width": size}
        members += [
            (f"{key}.jpg", image),
            (f"{key}.txt", f"picture {key}".encode()),
            (f"{key}.json", json.dumps(meta).encode()),
        ]
    return write_tar(folder / f"{number:05d}.tar", members)


@pytest.fixture
def make_shard():
    """The function :func:`img2dataset_shard`."""
    return img2dataset_shard


@pytest.fixture
def tar():
    """The function :func:`write_tar`."""
    return write_tar


@pytest.fixture
def encode():
    """The function :func:`encoded`."""
    return encoded
