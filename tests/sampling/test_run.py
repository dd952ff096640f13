"""A sample folder from its first file to its manifest."""

import json

import pytest
import torch

from memfree.folders.lock import part_of
from memfree.sampling import SampleRun
from memfree.sampling.sample_run import shard_indices
from memfree.sampling.writer import write_shard

SETTINGS = {"steps": 50, "guidance": {"c1": 5.0}, "model_sha256": "a" * 64}


def add_shard(folder, name, indices):
    records = [{"index": i, "seed": 0, "condition": None} for i in indices]
    images = torch.zeros(len(indices), 1, 4, 4, dtype=torch.uint8)
    write_shard(folder / f"samples-{name}.tar", records, images)


@pytest.fixture
def run(tmp_path):
    made = SampleRun(tmp_path / "out", SETTINGS, count=6)
    made.begin()
    yield made
    made.release()


def test_a_new_run_lacks_everything(run):
    assert run.missing() == [0, 1, 2, 3, 4, 5]
    assert not run.finished
    assert run.next_shard(0) == 0
    assert json.loads((run.folder / "run.json").read_text())["guidance"] == {"c1": 5.0}


def test_the_same_run_continues(run):
    add_shard(run.folder, "000-000000", [0, 1])
    add_shard(run.folder, "001-000003", [4])
    run.release()
    again = SampleRun(run.folder, SETTINGS, count=6)
    again.begin()
    assert again.missing() == [2, 3, 5]
    assert again.next_shard(0) == 1
    assert again.next_shard(1) == 4
    assert again.next_shard(2) == 0
    again.release()


@pytest.mark.parametrize(
    ("changed", "count", "message"),
    [
        ({"steps": 20}, 6, "steps is 50 there and 20 here"),
        ({"guidance": {"c1": 1.0}}, 6, r"guidance\.c1 is 5\.0 there and 1\.0 here"),
        ({"model_sha256": "b" * 64}, 6, "made with another model;"),
        ({"new": 1}, 6, "new is None there and 1 here"),
        ({}, 7, "count is 6 there and 7 here"),
    ],
)
def test_another_run_is_refused(run, changed, count, message):
    add_shard(run.folder, "000-000000", [0])
    before = sorted(path.name for path in run.folder.iterdir())
    with pytest.raises(ValueError, match=message) as error:
        SampleRun(run.folder, {**SETTINGS, **changed}, count).begin()
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in run.folder.iterdir()) == before


def test_a_run_without_a_shard_binds_nobody(run):
    run.release()
    SampleRun(run.folder, {"steps": 20}, 3).begin()
    assert json.loads((run.folder / "run.json").read_text()) == {"count": 3, "steps": 20}


def test_other_files_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        SampleRun(tmp_path, SETTINGS, 6).begin()
    with pytest.raises(ValueError, match="is a file"):
        SampleRun(tmp_path / "thesis.tex", SETTINGS, 6).begin()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_second_process_is_refused(run):
    other = SampleRun(run.folder, SETTINGS, count=6)
    with pytest.raises(ValueError, match="another process"):
        other.begin()
    run.lock(1)
    with pytest.raises(ValueError, match="another process"):
        other.lock(1)
    run.release()
    other.begin()
    other.release()


def test_leaving_the_context_lets_go(run):
    run.release()
    with pytest.raises(RuntimeError, match="out of memory"), run:
        raise RuntimeError("out of memory")
    with SampleRun(run.folder, SETTINGS, count=6) as other:
        assert other.missing()[0] == 0


def test_clean_up_removes_only_leftovers(run):
    add_shard(run.folder, "000-000000", [0])
    for name in ("trace-000-000000.parquet", "trace-000-000001.parquet"):
        (run.folder / name).touch()
    (run.folder / ".samples-000-000001.tar.77.tmp").touch()
    run.clean_up()
    left = sorted(path.name for path in run.folder.iterdir() if path.name[0] != ".")
    assert left == ["run.json", "samples-000-000000.tar", "trace-000-000000.parquet"]
    assert not list(run.folder.glob(".*.tmp"))


def test_finish_refuses_gaps_and_repeats(run):
    add_shard(run.folder, "000-000000", [0, 1, 2])
    with pytest.raises(ValueError, match=r"lacks 3 of 6 samples \(first: 3\)"):
        run.finish(seed=0)
    add_shard(run.folder, "001-000000", [2, 3])
    with pytest.raises(ValueError, match="repeats sample 2"):
        run.missing()
    add_shard(run.folder, "001-000000", [3, 4, 5])
    run.finish(seed=9, mitigation="none")
    manifest = run.manifest()
    assert manifest["count"] == 6
    assert manifest["settings"]["steps"] == 50
    assert manifest["made_by"]["seed"] == 9
    assert manifest["shards"] == ["samples-000-000000.tar", "samples-001-000000.tar"]
    assert run.finished
    assert not list(run.folder.glob(".lock-*"))


def finished(run):
    """Two shards with three samples each, the first with a trace."""
    add_shard(run.folder, "000-000000", [0, 1, 2])
    (run.folder / "trace-000-000000.parquet").write_bytes(bytes(50))
    add_shard(run.folder, "000-000001", [3, 4, 5])
    run.finish(seed=0)
    run.release()
    return SampleRun(run.folder, SETTINGS, count=6)


def test_a_file_that_was_cut_is_named_with_the_shard_to_delete(run):
    again = finished(run)
    again.verify()
    shard = run.folder / "samples-000-000000.tar"
    trace = run.folder / "trace-000-000000.parquet"
    for path in (trace, shard):
        whole = path.read_bytes()
        path.write_bytes(whole[:40])
        with pytest.raises(ValueError) as error:
            again.verify()
        text = str(error.value)
        assert f"{path} has 40 bytes, not {len(whole)}: delete {shard} and repeat" in text
        path.write_bytes(whole)
    trace.unlink()
    with pytest.raises(ValueError, match="parquet has 0 bytes, not 50: delete .*000000.tar"):
        again.verify()


def test_a_folder_without_recorded_sizes_is_believed(run):
    again = finished(run)
    manifest = run.folder / "manifest.json"
    value = json.loads(manifest.read_text())
    assert value.pop("files")["trace-000-000000.parquet"] == 50
    manifest.write_text(json.dumps(value))
    run.shards()[0].write_bytes(b"")
    again.verify()


@pytest.mark.parametrize("lost", [[0], [0, 1]])
def test_a_folder_that_lost_shards_is_begun_again(run, lost):
    again = finished(run)
    shards = run.shards()
    for number in lost:
        shards[number].unlink()
    again.check()
    assert (run.folder / "manifest.json").is_file()
    assert not again.finished
    with again:
        assert not (run.folder / "manifest.json").exists()
        assert again.missing() == [i for number in lost for i in range(3 * number, 3 * number + 3)]
        again.clean_up()
        assert not list(run.folder.glob("trace-*"))


def test_checking_writes_nothing(tmp_path):
    SampleRun(tmp_path / "out", SETTINGS, 6).check()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_shard_is_named(run):
    shard = run.folder / "samples-000-000000.tar"
    shard.write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match="samples-000-000000.tar is damaged"):
        shard_indices(shard)
    with pytest.raises(ValueError, match="remove it"):
        run.missing()


def part(run, text, settings=SETTINGS):
    return SampleRun(run.folder, settings, count=6, part=part_of(text))


def test_a_part_lacks_its_own_samples(run):
    add_shard(run.folder, "000-000000", [0, 1])
    third, first = part(run, "3/3"), part(run, "1/3")
    assert third.missing() == [2, 3, 4, 5]
    assert third.missing_here() == [2, 5] and first.missing_here() == [3]
    assert third.writer(1) == "003-001" and run.writer(1) == "001"
    add_shard(run.folder, f"{third.writer(0)}-000004", [2])
    assert third.next_shard(0) == 5 and third.next_shard(1) == 0 and first.next_shard(0) == 0
    assert third.missing_here() == [5]


def test_a_part_of_another_run_is_refused_before_there_is_a_shard(run):
    with pytest.raises(ValueError, match="steps is 50 there and 20 here"):
        part(run, "1/2", {**SETTINGS, "steps": 20}).begin()
    part(run, "1/2").check()


def test_a_part_leaves_what_others_are_writing(run):
    others = [".samples-002-000-000000.tar.7.tmp", "trace-002-000-000000.parquet"]
    mine = [".samples-001-000-000000.tar.7.tmp", "trace-001-000-000000.parquet"]
    for name in [*others, *mine]:
        (run.folder / name).touch()
    part(run, "1/2").clean_up()
    left = {path.name for path in run.folder.iterdir()}
    assert left.issuperset(others) and not left.intersection(mine)
    run.clean_up()
    assert not {path.name for path in run.folder.iterdir()}.intersection(others)
