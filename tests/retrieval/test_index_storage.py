"""The index folder: what is saved is loaded, and what is hostile or damaged is refused."""

import io
import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from memfree.retrieval import PixelFeatures, ReferenceIndex, Whitened
from memfree.retrieval import index_folder as storage_module


def random_images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 4, 4, generator=generator) * 2 - 1


def build(seed=0, **kwargs):
    return ReferenceIndex.build(
        random_images(12, seed)[[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0]],
        labels=torch.arange(12) % 3,
        captions=[f"caption {i}" for i in range(12)],
        groups=[i % 9 for i in range(12)],
        **kwargs,
    )


@pytest.fixture
def folder(tmp_path):
    index = build()
    index.calibrations["nl2-k3-a0.5"] = {"sigmas": [-1.0, -0.5]}
    index.save(tmp_path / "index")
    return tmp_path / "index"


def test_what_is_saved_is_loaded(folder):
    saved, loaded = build(), ReferenceIndex.load(folder)
    for name in ("vectors", "group", "multiplicity", "group_multiplicity", "labels"):
        assert torch.equal(getattr(saved, name), getattr(loaded, name)), name
    assert torch.equal(saved.label_counts, loaded.label_counts)
    assert (saved.keys, saved.captions) == (loaded.keys, loaded.captions)
    assert (saved.image_shape, saved.num_classes) == (loaded.image_shape, loaded.num_classes)
    assert loaded.calibrations == {"nl2-k3-a0.5": {"sigmas": [-1.0, -0.5]}}
    assert loaded.metric == "l2"
    queries = random_images(5, seed=3)
    a, b = saved.search(queries, 3), loaded.search(queries, 3)
    assert torch.equal(a.rows, b.rows)
    assert torch.equal(a.scores, b.scores)


def test_vectors_are_mapped_and_the_file_is_never_written(folder, monkeypatch):
    mapped = []
    memmap = np.memmap
    monkeypatch.setattr(np, "memmap", lambda *a, **k: mapped.append(k["mode"]) or memmap(*a, **k))
    before = (folder / "vectors.npy").read_bytes()
    index = ReferenceIndex.load(folder)
    index.vectors[0] = 5.0
    assert mapped == ["c"]
    assert (folder / "vectors.npy").read_bytes() == before


def test_numpy_reads_the_vectors(folder):
    array = np.load(folder / "vectors.npy", allow_pickle=False)
    assert torch.equal(torch.from_numpy(array), build().vectors)


def test_the_folder_says_what_it_holds(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert "training images" in manifest["contains_training_data"]
    assert manifest["features"] == PixelFeatures().describe()
    assert (manifest["rows"], manifest["groups"], manifest["records"]) == (10, 7, 12)
    assert manifest["num_classes"] == 3
    items = pq.read_table(folder / "items.parquet")
    assert items.column_names == ["row", "image_key", "group", "multiplicity", "shard", "content"]
    assert items["multiplicity"].to_pylist()[:2] == [3, 1]
    conditions = pq.read_table(folder / "conditions.parquet")
    assert conditions.num_rows == 12


def test_saving_again_replaces_the_same_data_only(folder):
    index = ReferenceIndex.load(folder)
    index.save(folder)  # while its own vectors are mapped
    assert torch.equal(ReferenceIndex.load(folder).vectors, build().vectors)
    with pytest.raises(ValueError, match="another dataset"):
        build(seed=1).save(folder)  # same keys, groups and counts
    other = ReferenceIndex.build(random_images(5, seed=9))
    with pytest.raises(ValueError, match="another dataset;.*--overwrite"):
        other.save(folder)
    assert len(ReferenceIndex.load(folder)) == 10
    other.save(folder, overwrite=True)
    assert len(ReferenceIndex.load(folder)) == 5
    assert [path.name for path in folder.parent.iterdir()] == ["index"]


def test_an_index_of_other_features_is_kept(tmp_path):
    pixels, whitened = build(), build(features=Whitened.fit(PixelFeatures(), random_images(60)))
    pixels.dataset_hash = whitened.dataset_hash = "the same"
    pixels.save(tmp_path / "index")
    with pytest.raises(ValueError, match="features.name is"):
        whitened.save(tmp_path / "index")
    assert ReferenceIndex.load(tmp_path / "index").metric == "l2"
    whitened.save(tmp_path / "index", overwrite=True)
    assert ReferenceIndex.load(tmp_path / "index").metric == "cosine"


def test_what_is_no_index_is_never_replaced(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="thesis.txt"):
            build().save(tmp_path / "notes", overwrite)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        build().save(tmp_path / "file")
    assert (tmp_path / "notes" / "thesis.txt").exists()


def test_an_interrupted_save_leaves_the_old_index(folder, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(storage_module, "write_manifest", fail)
    with pytest.raises(OSError, match="no space"):
        build().save(folder)
    assert len(ReferenceIndex.load(folder)) == 10
    assert [path.name for path in folder.parent.iterdir()] == ["index"]


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="free"):
        build().save(tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_features_are_made_again_without_code(tmp_path):
    features = Whitened.fit(PixelFeatures(), random_images(60, seed=5))
    index = build(features=features)
    index.save(tmp_path / "index")
    loaded = ReferenceIndex.load(tmp_path / "index")
    queries = random_images(5, seed=3)
    assert loaded.metric == "cosine"
    assert torch.equal(loaded.features(queries), features(queries))
    assert torch.equal(loaded.search(queries, 4).scores, index.search(queries, 4).scores)
    with pytest.raises(ValueError, match="holds no images"):
        loaded.images(torch.tensor([0]))


class Exploit:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def pickled(folder):
    buffer = io.BytesIO()
    np.save(buffer, np.array([Exploit()], dtype=object), allow_pickle=True)
    (folder / "vectors.npy").write_bytes(buffer.getvalue())


def bare_pickle(folder):
    (folder / "vectors.npy").write_bytes(pickle.dumps(Exploit()))


def header(folder, shape, dtype="<f4", fortran=False):
    buffer = io.BytesIO()
    value = {"descr": dtype, "fortran_order": fortran, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, value)
    (folder / "vectors.npy").write_bytes(buffer.getvalue() + b"\0" * 640)


def change_manifest(folder, **fields):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **fields}))


def absurd_rows(folder):
    header(folder, (1 << 39, 16))
    change_manifest(folder, rows=1 << 39)


def wrong_groups(folder):
    table = pq.read_table(folder / "items.parquet")
    group = pa.array([1 << 40] * table.num_rows)
    pq.write_table(table.set_column(2, "group", group), folder / "items.parquet")
    change_manifest(
        folder, files={"items.parquet": storage_module.sha256(folder / "items.parquet")}
    )


def unused_groups(folder):
    change_manifest(folder, groups=8)


def unknown_extractor(folder):
    change_manifest(folder, features={"name": "os.system"})


def other_preprocessing(folder):
    change_manifest(folder, features={**PixelFeatures().describe(), "preprocessing": "u8"})


def replace_items(folder):
    table = pq.read_table(folder / "items.parquet")
    pq.write_table(table.slice(0, 5), folder / "items.parquet")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickled, "not a plain float32 array|holds object"),
        (bare_pickle, "not a plain float32 array"),
        (lambda f: header(f, (10, 17)), "float32 array of 10 rows and 640 bytes"),
        (lambda f: header(f, (10, 16), "<f8"), "float32 array of 10 rows and 640 bytes"),
        (lambda f: header(f, (10, 16), fortran=True), "manifest.json says float32"),
        (lambda f: (f / "vectors.npy").write_bytes((f / "vectors.npy").read_bytes()[:-4]), "bytes"),
        (lambda f: (f / "vectors.npy").unlink(), "vectors.npy is missing"),
        (absurd_rows, "bytes, but 35184372088960 are needed|rows"),
        (lambda f: change_manifest(f, rows=-1), "rows is -1"),
        (lambda f: change_manifest(f, rows="10"), "rows is '10'"),
        (lambda f: change_manifest(f, image_shape=[1, 4]), "image_shape has not 3"),
        (lambda f: change_manifest(f, image_shape=[1, 4, 5]), "cannot have vectors"),
        (lambda f: change_manifest(f, files={"../../secret": "00"}), "no index has"),
        (lambda f: change_manifest(f, kind="model"), "holds 'model', not an index folder"),
        (lambda f: change_manifest(f, format=99), "format 99"),
        (lambda f: change_manifest(f, num_classes=2), "contradict"),
        (lambda f: (f / "manifest.json").unlink(), "not a finished index folder"),
        (lambda f: (f / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "items.parquet").unlink(), "items.parquet is missing"),
        (lambda f: (f / "calibration.json").write_text("[1]"), "calibration.json"),
        (replace_items, "not the file that manifest.json describes"),
        (wrong_groups, "contradict"),
        (unused_groups, "contradict"),
        (unknown_extractor, "unknown feature extractor 'os.system'"),
        (other_preprocessing, "other preprocessing or weights"),
    ],
)
def test_hostile_and_damaged_folders_are_one_clear_line(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        ReferenceIndex.load(folder)
    assert "\n" not in str(error.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no index folder at"):
        ReferenceIndex.load(tmp_path / "nowhere")


def test_calibrations_can_be_saved_alone(folder):
    index = ReferenceIndex.load(folder)
    index.calibrations["cosine"] = {"sigmas": [0.5]}
    index.save_calibrations(folder)
    assert ReferenceIndex.load(folder).calibrations.keys() == {"nl2-k3-a0.5", "cosine"}


def flipped(path, where):
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1 << 4
    path.write_bytes(data)


FILES = ("vectors.npy", "items.parquet", "conditions.parquet", "calibration.json")


@pytest.mark.parametrize("where", [0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_noticed(folder, name, where):
    flipped(folder / name, where)
    with pytest.raises(ValueError, match=name):
        ReferenceIndex.load(folder)


def test_a_flipped_bit_of_whitened_features_is_noticed(tmp_path):
    build(features=Whitened.fit(PixelFeatures(), random_images(60))).save(tmp_path / "index")
    flipped(tmp_path / "index" / "features.safetensors", 0.9)
    with pytest.raises(ValueError, match="features.safetensors"):
        ReferenceIndex.load(tmp_path / "index")


def test_checksums_can_be_skipped(folder, monkeypatch):
    flipped(folder / "vectors.npy", 0.9)
    assert len(ReferenceIndex.load(folder, verify=False)) == 10
    monkeypatch.setenv("MEMFREE_SKIP_CHECKSUMS", "1")
    assert len(ReferenceIndex.load(folder)) == 10


def test_indexes_without_checksums_are_opened(folder):
    """As earlier versions wrote them; a value that is no number is refused all the same."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["vectors_crc32"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    calibrations = json.loads((folder / "calibration.json").read_text())
    del calibrations["nl2-k3-a0.5"]["sha256"]
    (folder / "calibration.json").write_text(json.dumps(calibrations))
    assert ReferenceIndex.load(folder).calibrations == {"nl2-k3-a0.5": {"sigmas": [-1.0, -0.5]}}
    array = np.load(folder / "vectors.npy", mmap_mode="r+")
    for value in (np.nan, np.inf, -np.inf):
        array[3, 2] = value
        array.flush()
        with pytest.raises(ValueError, match="vectors.npy holds NaN"):
            ReferenceIndex.load(folder)


def test_checksums_of_blocks(tmp_path, monkeypatch):
    import zlib

    from memfree.folders import manifest as hashes

    monkeypatch.setattr(hashes, "_BLOCK", 64)
    monkeypatch.setattr(hashes, "_CHUNK", 16)
    data = np.random.default_rng(0).bytes(1000)
    (tmp_path / "a").write_bytes(data)
    expected = [zlib.crc32(data[start : start + 64]) for start in range(0, 1000, 64)]
    assert hashes.block_checksums(tmp_path / "a") == expected
    (tmp_path / "a").write_bytes(b"")
    assert hashes.block_checksums(tmp_path / "a") == []


def test_short_reads_do_not_change_checksums(tmp_path, monkeypatch):
    """A network's disk may give fewer bytes than were asked for."""
    import zlib

    from memfree.folders import manifest as hashes

    class Short(io.FileIO):
        def read(self, size=-1):
            return super().read(min(size, 7))

        def readinto(self, buffer):
            return super().readinto(memoryview(buffer)[:7])

    def opened(path, mode, buffering=-1):
        return Short(path) if buffering == 0 else io.BufferedReader(Short(path))

    monkeypatch.setattr(hashes, "open", opened, raising=False)
    data = np.random.default_rng(0).bytes(1000)
    (tmp_path / "a").write_bytes(data)
    assert hashes.block_checksums(tmp_path / "a") == [zlib.crc32(data)]
