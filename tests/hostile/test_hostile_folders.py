"""Dataset, index, sample and evaluation folders that somebody spoilt."""

import json
import os
import shutil
import struct

import numpy as np
import pyarrow as pa
import pytest
from hostile_guard import bounded, one_line, refused, tree
from hostile_payloads import (
    OTHER_VALUES,
    Canary,
    bad_images,
    object_array,
    pickled,
    png,
)
from spoiling import bomb, edit, filled, places, rewritten, wrong_json
from test_hostile_tars import RECORDS, add, sparse, special, written

from memfree.data import DatasetFolder
from memfree.data.prompts import prompt_set
from memfree.evaluation.folder import EvaluationFolder
from memfree.evaluation.metrics import read_metrics
from memfree.evaluation.plots import _draw
from memfree.folders.manifest import read_manifest
from memfree.guidance.calibration import Calibration, calibration_of, default_similarity
from memfree.retrieval import ReferenceIndex
from memfree.sampling import SampleFolder, SampleRun


def read_dataset(folder):
    data = DatasetFolder(folder, verify=True)
    for part in ("train", "calibration", "test", "fit"):
        data.part(part).images()
    if data.manifest.get("captions"):
        prompt_set(data, "duplicated")


def read_index(folder):
    index = ReferenceIndex.load(folder)
    for value in index.calibrations.values():
        Calibration.from_json(value)
    _ = index.items.caption_counts
    calibration_of(index, default_similarity(index)).threshold(0.05)


def read_samples(folder):
    samples = SampleFolder(folder)
    samples.images()
    samples.trace()
    run = SampleRun(folder, {}, len(samples))
    if run.finished:
        run.verify()
    assert run.missing() == [] and run.next_shard(0) == 1


def read_evaluation(folder):
    evaluation = EvaluationFolder(folder)
    evaluation.check_figures()
    evaluation.distances()
    assert all(isinstance(one.value, float) for one in evaluation.metrics.metrics)


READERS = {
    "data": read_dataset,
    "index": read_index,
    "samples": read_samples,
    "evaluation": read_evaluation,
}


def npy(shape, descr="<f4", body=b"", version=1, header=None):
    """An .npy file of this header."""
    text = header or f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}"
    data = text.encode() + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(data))
    return b"\x93NUMPY" + bytes([version, 0]) + length + data + body


def vectors(content):
    return lambda folder: (folder / "vectors.npy").write_bytes(content)


def absurd_vectors(folder):
    """Rows beyond all memory, in a file that is as large as it says and has nothing in it."""
    rows = 1 << 36
    header = npy((rows, 16))
    with open(folder / "vectors.npy", "wb") as file:
        file.write(header)
        file.truncate(len(header) + rows * 64)
    edit(folder / "manifest.json", "rows", rows)


def table(name, column, value, kind=pa.int64()):  # noqa: B008 - an immutable value
    return lambda folder: rewritten(folder, name, filled(column, value, kind))


def manifest(*keys_and_value):
    return lambda folder: edit(folder / "manifest.json", *keys_and_value)


def shard(write, name="samples-000-000000.tar", mode="w"):
    return lambda folder: written(folder / name, write, mode)


def sample(image=None, name="00000000", **record):
    """A shard of one sample."""
    value = {"index": 0, "seed": 5, "condition": 1, **record}

    def write(archive):
        add(archive, f"{name}.png", png() if image is None else image)
        add(archive, f"{name}.json", json.dumps(value).encode())

    def spoil(folder):
        written(folder / "samples-000-000000.tar", write)
        edit(folder / "manifest.json", "count", 1)

    return spoil


def link(name, target):
    def spoil(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return spoil


def fifo(name):
    def spoil(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


def endless(name):
    def spoil(folder):
        with open(folder / name, "r+b") as file:
            file.truncate(1 << 42)

    return spoil


SPOILT = {
    "data": {
        **wrong_json("manifest.json"),
        "manifest without end": endless("manifest.json"),
        "manifest that is a device": link("manifest.json", "/dev/zero"),
        "manifest that is a fifo": fifo("manifest.json"),
        "shape beyond memory": manifest("image_shape", [1, 1 << 30, 1 << 30]),
        "shape below zero": manifest("image_shape", [1, -8, -8]),
        "shape without end": manifest("image_shape", [1, 1e300, 8]),
        "classes without number": manifest("num_classes", "ten"),
        "classes below zero": manifest("num_classes", -10),
        "fewer classes than labels": manifest("num_classes", 2),
        "shard elsewhere": manifest("shards", {"../../etc/passwd": {"bytes": 1, "sha256": ""}}),
        "shard at the root": manifest("shards", {"/etc/passwd": {"bytes": 1, "sha256": ""}}),
        "shard of a zero byte": manifest("shards", {"a\0b": {"bytes": 1, "sha256": ""}}),
        "shard that is the parent": manifest("shards", {"..": {"bytes": 1, "sha256": ""}}),
        "shards in a list": manifest("shards", ["train-000000.tar"]),
        "parts in a list": manifest("parts", ["train"]),
        "parts of text": manifest("parts", {"train": {"records": "many"}}),
        "items of other columns": lambda f: rewritten(f, "items.parquet", lambda t: t.select([0])),
        "items without keys": table("items.parquet", "image_key", None, pa.string()),
        "items of numbers": table("items.parquet", "image_key", 7),
        "items below zero": table("items.parquet", "copies", -1),
        "items of another part": table("items.parquet", "part", "other", pa.string()),
        "items that are a bomb": lambda f: bomb(f, "items.parquet"),
        "items that are text": lambda f: (f / "items.parquet").write_text("PAR1 PAR1"),
        "items that are a fifo": fifo("items.parquet"),
        "records of other columns": lambda f: rewritten(
            f, "records.parquet", lambda t: t.select([0, 1])
        ),
        "records without rows": table("records.parquet", "row", None),
        "records of unknown rows": table("records.parquet", "row", 1 << 40),
        "records of one row": table("records.parquet", "row", 0),
        "records in the order of others": lambda f: rewritten(
            f,
            "records.parquet",
            lambda t: t.set_column(
                t.schema.get_field_index("row"), "row", pa.array(t["row"].to_pylist()[::-1])
            ),
        ),
        "records before their shard": table("records.parquet", "offset", -1),
        "records behind their shard": table("records.parquet", "offset", (1 << 63) - 1),
        "records beyond memory": table("records.parquet", "size", 1 << 62),
        "records of no size": table("records.parquet", "size", 0),
        "records elsewhere": table("records.parquet", "shard", "../../etc/passwd", pa.string()),
        "records of unknown classes": table("records.parquet", "label", 1 << 40),
        "records of no class": table("records.parquet", "label", None),
        "records that are a bomb": lambda f: bomb(f, "records.parquet"),
        "conditions of other columns": lambda f: rewritten(
            f, "conditions.parquet", lambda t: t.select([0])
        ),
        "conditions of unknown images": table(
            "conditions.parquet", "image_key", "nobody", pa.string()
        ),
        "conditions below zero": table("conditions.parquet", "count", -1),
        "conditions that are a bomb": lambda f: bomb(f, "conditions.parquet"),
    },
    "index": {
        **wrong_json("manifest.json"),
        **wrong_json("calibration.json"),
        "calibration without end": endless("calibration.json"),
        "calibration that is a device": link("calibration.json", "/dev/zero"),
        "calibration that is a fifo": fifo("calibration.json"),
        "array with a pickle": lambda f: vectors(object_array(f.parent / "canary"))(f),
        "pickle as an array": lambda f: vectors(pickled(f.parent / "canary"))(f),
        "array of another version": vectors(npy((12, 16), version=2)),
        "array with a long header": vectors(npy((12, 16), header=" " * 65_000)),
        "array with a deep header": vectors(npy((12, 16), header="(" * 9_000)),
        "array with a call in its header": vectors(npy((1,), header="open('canary', 'w')")),
        "array with unhashable keys": vectors(npy((1,), header="{[]: 1}")),
        "array with text that has no end": vectors(npy((1,), header="{'descr': '''")),
        "array below zero": vectors(npy((-12, -16))),
        "array beyond memory": absurd_vectors,
        "array that is a fifo": fifo("vectors.npy"),
        "array that is a device": link("vectors.npy", "/dev/zero"),
        "rows beyond memory": manifest("rows", 1 << 39),
        "classes beyond memory": manifest("num_classes", 1 << 30),
        "classes that are true": manifest("num_classes", True),
        "shape beyond memory": manifest("image_shape", [1, 1 << 40, 1 << 40]),
        "shape that is true": manifest("image_shape", [True, 4, 4]),
        "features of another module": manifest("features", {"name": "os.system"}),
        "features of a device": manifest(
            "features",
            {"name": "sscd", "path": "/dev/zero", "preset": "amg", "model": "disc_mixup"}
            | {"dtype": "float32"},
        ),
        "CLIP of a device": manifest(
            "features",
            {"name": "clip", "path": "/dev/zero", "model": "ViT-B-32", "pretrained": None}
            | {"dtype": "float32"},
        ),
        "CLIP of an address": manifest(
            "features",
            {"name": "clip", "path": "/etc/passwd", "model": "hf-hub:a/b", "pretrained": None}
            | {"dtype": "float32"},
        ),
        "timm of an address": manifest(
            "features",
            {"name": "timm", "path": None, "model": "hf-hub:a/b", "pretrained": True}
            | {"dtype": "float32", "seed": 0},
        ),
        "features of no arithmetic": manifest(
            "features", {"name": "timm", "model": "resnet18", "path": None, "pretrained": False}
        ),
        "network beyond memory": manifest(
            "features",
            {"name": "copy-detection", "path": None}
            | {"shape": {"channels": 3, "size": 4, "widths": [4096] * 8, "dimension": 4096}},
        ),
        "files elsewhere": manifest("files", {"../../etc/passwd": "0"}),
        "group below zero": table("items.parquet", "group", -1),
        "group beyond memory": table("items.parquet", "group", 1 << 40),
        "no group": table("items.parquet", "group", None),
        "multiplicity below zero": table("items.parquet", "multiplicity", -1),
        "multiplicity of no number": table("items.parquet", "multiplicity", None),
        "multiplicity of text": table("items.parquet", "multiplicity", "1", pa.string()),
        "no key": table("items.parquet", "image_key", None, pa.string()),
        "items that are a bomb": lambda f: bomb(f, "items.parquet", rows=12, text_bytes=1 << 28),
        "row out of range": table("conditions.parquet", "row", 12),
        "row below zero": table("conditions.parquet", "row", -1),
        "no row": table("conditions.parquet", "row", None),
        "label out of range": table("conditions.parquet", "label", 3),
        "count below zero": table("conditions.parquet", "count", -5),
        "no count": table("conditions.parquet", "count", None),
        "conditions that are a bomb": lambda f: bomb(f, "conditions.parquet"),
    },
    "samples": {
        **wrong_json("manifest.json"),
        "shape beyond memory": manifest("image_shape", [1, 60_000, 60_000]),
        "shape below zero": manifest("image_shape", [1, -4, 4]),
        "shape without end": manifest("image_shape", [1, 1e300, 4]),
        "shard elsewhere": manifest("shards", ["../../etc/passwd"]),
        "shard at the root": manifest("shards", ["/etc/passwd"]),
        "shard of no text": manifest("shards", [7]),
        "shards of text": manifest("shards", "samples-000-000000.tar"),
        "files of text": manifest("files", "x"),
        "files elsewhere": manifest("files", {"../x": 7}),
        "files of other sizes": manifest("files", {"samples-000-000000.tar": "many"}),
        "count beyond memory": manifest("count", 1 << 50),
        "count without end": manifest("count", 1e300),
        "seed of no number": sample(seed="a"),
        "seed beyond 64 bits": sample(seed=1 << 70),
        "condition beyond 64 bits": sample(condition=1 << 70),
        "index below zero": sample(index=-1),
        "index that is true": sample(index=True),
        "deep record": shard(RECORDS["JSON: deep"]),
        "record of a list": shard(RECORDS["JSON: a list"]),
        "linked record": shard(special(__import__("tarfile").SYMTYPE, "1.png")),
        "sparse image": shard(sparse(1 << 40)),
        "packed shard": shard(RECORDS["absolute name"], mode="w:gz"),
        "shard that is a device": link("samples-000-000000.tar", "/dev/zero"),
        "shard that is a fifo": fifo("samples-000-000000.tar"),
        "shard of another name": lambda f: shutil.copy(
            f / "samples-000-000000.tar", f / "samples-000-x.tar"
        ),
        "trace of other columns": lambda f: rewritten(
            f, "trace-000-000000.parquet", lambda t: t.drop_columns(["sample"])
        ),
        "trace that is a bomb": lambda f: bomb(f, "trace-000-000000.parquet"),
        "trace that is a fifo": fifo("trace-000-000000.parquet"),
        **{
            f"image: {name}": sample(image=data)
            for name, data in bad_images().items()
            if not name.endswith("5000 scans")
        },
    },
    "evaluation": {
        **wrong_json("manifest.json"),
        **{
            name: spoil
            for name, spoil in wrong_json("metrics.json").items()
            if not name.endswith("x")
        },
        "metrics without end": endless("metrics.json"),
        "value of text": lambda f: edit(f / "metrics.json", 0, "value", "high"),
        "value of a list": lambda f: edit(f / "metrics.json", 0, "value", [1]),
        "value of no size": lambda f: edit(f / "metrics.json", 0, "value", 10**400),
        "name of a list": lambda f: edit(f / "metrics.json", 0, "metric", []),
        "subject of a number": lambda f: edit(f / "metrics.json", 0, "subject", 7),
        "interval of text": lambda f: edit(f / "metrics.json", 0, "low", "x"),
        "count of text": lambda f: edit(f / "metrics.json", 0, "count", "x"),
        "detail of text": lambda f: edit(f / "metrics.json", 0, "detail", "x"),
        "unknown field": lambda f: edit(f / "metrics.json", 0, "__class__", "x"),
        "samples in a list": manifest("samples", ["a"]),
        "reference of a list": manifest("reference", []),
        "reference of nobody": manifest("reference", "nobody"),
        "pairs of a number": manifest("paired", 7),
        "samples that are a bomb": lambda f: bomb(f, "per_sample.parquet"),
        "samples of other columns": lambda f: rewritten(
            f, "per_sample.parquet", lambda t: t.select([0])
        ),
    },
}
ENTRIES = [(kind, name) for kind, entries in SPOILT.items() for name in entries]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_spoilt_folders_are_refused(copy, tmp_path, monkeypatch, kind, name):
    monkeypatch.chdir(tmp_path)
    folder = copy(kind)
    SPOILT[kind][name](folder)
    before = tree(tmp_path)
    refused(lambda: READERS[kind](folder), folder)
    assert tree(tmp_path) == before and not (tmp_path / "canary").exists()


@pytest.mark.parametrize("kind", READERS)
def test_whole_folders_are_read(whole, kind):
    with bounded():
        READERS[kind](whole / kind)


@pytest.mark.parametrize("kind", READERS)
def test_any_other_value_in_a_manifest_is_read_or_refused(copy, kind):
    folder = copy(kind)
    whole = (folder / "manifest.json").read_text()
    spots = [keys for keys in places(json.loads(whole)) if keys[0] != "made_by"]
    spots = [spots[i] for i in np.linspace(0, len(spots) - 1, min(len(spots), 8)).astype(int)]
    for keys in spots:
        for value in OTHER_VALUES:
            edit(folder / "manifest.json", *keys, value)
            try:
                with bounded():
                    READERS[kind](folder)
            except (ValueError, OSError) as error:
                one_line(error)
            (folder / "manifest.json").write_text(whole)


@pytest.mark.parametrize("kind", READERS)
def test_manifests_of_another_kind_name_the_folder(copy, kind):
    folder = copy(kind)
    for value in OTHER_VALUES:
        edit(folder / "manifest.json", "kind", value)
        refused(lambda: read_manifest(folder, kind), folder)


@pytest.mark.parametrize("sigmas", [[float("nan")], [], [[1.0]], "x", [10**400], [None], {}, 7])
def test_thresholds_that_are_none(sigmas):
    refused(lambda: Calibration.from_json({"similarity": "s", "sigmas": sigmas}), "calibration")


def test_metrics_that_are_no_file(tmp_path):
    os.mkfifo(tmp_path / "metrics.json")
    refused(lambda: read_metrics(tmp_path / "metrics.json"), tmp_path)
    assert Canary("x").path == "x"


def test_pictures_are_decoded_within_limits():
    row = {"png": png(60_000, 60_000), "subject": "a", "copy": False}
    refused(lambda: _draw(None, row), "picture")
