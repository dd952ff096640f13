"""Which folders a command may write, and the one sentence for those that it may not."""

import json

import pytest

from memfree.folders import atomic
from memfree.folders.claim import check_kind, claim, first_difference, refuse_files
from memfree.folders.manifest import write_manifest
from memfree.retrieval.index_folder import claim_index

MADE = {"seed": 0, "weights_sha256": "a", "model": {"width": 8}}


@pytest.fixture
def made(tmp_path):
    """A finished evaluation."""
    out = tmp_path / "out"
    out.mkdir()
    write_manifest(out, "evaluation", identity=MADE)
    for name in ("metrics.json", "config.yaml", ".lock"):
        (out / name).touch()
    return out


def held(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("identity", "overwrite", "found"),
    [
        (MADE, None, "finished"),
        (MADE, True, "finished"),
        ({**MADE, "later": None}, False, "finished"),
        ({**MADE, "seed": 1}, True, "open"),
        (None, None, "open"),
    ],
)
def test_what_is_accepted(made, identity, overwrite, found):
    before = held(made.parent)
    assert claim(made, "evaluation", identity, overwrite) == found
    assert claim(made.parent / "new" / "one", "evaluation", identity, overwrite) == "open"
    assert held(made.parent) == before


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"model": {"width": 9}}, "model.width is 8 there and 9 here"),
        ({"weights_sha256": "b"}, "made with another weights"),
        ({"new": 1}, "new is None there and 1 here"),
    ],
)
def test_another_one_is_refused_in_one_sentence(made, changed, difference):
    before = held(made)
    with pytest.raises(ValueError) as error:
        claim(made, "evaluation", {**MADE, **changed}, overwrite=False)
    ways = "use another --out, or --overwrite true to delete it"
    assert str(error.value) == f"--out {made} holds something else: {difference}; {ways}"
    with pytest.raises(ValueError, match="use another --out$"):  # no such option
        claim(made, "evaluation", {**MADE, **changed})
    assert held(made) == before


@pytest.mark.parametrize("overwrite", [None, False, True])
@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda out: (out / "notes.md").touch(), "notes.md"),
        (lambda out: (out / "own" / "a").mkdir(parents=True), "own"),
        (lambda out: (out / "a\nb").touch(), "a b"),
        (lambda out: (out / "manifest.json").unlink(), ".lock and 2 more"),
        (lambda out: (out / "manifest.json").write_text("{"), "manifest.json is not valid JSON"),
        (lambda out: (out / "manifest.json").write_text("[]"), "holds 'list'"),
        (lambda out: write_manifest(out, "model"), "holds 'model', not an evaluation folder"),
    ],
)
def test_what_is_not_replaced_whatever_was_said(made, overwrite, spoil, named):
    spoil(made)
    before = held(made)
    with pytest.raises(ValueError) as error:
        claim(made, "evaluation", {**MADE, "seed": 1} if overwrite else None, overwrite)
    message = str(error.value)
    assert named in message and message.endswith("use another --out") and message.isprintable()
    assert held(made) == before


def test_own_files_may_lie_beside_what_is_finished(made):
    (made / "notes.md").touch()
    assert claim(made, "evaluation", MADE) == "finished"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").touch()
    for refused in (refuse_files, lambda out: check_kind(out, "demo"), lambda out: claim(out, "x")):
        with pytest.raises(ValueError, match="--out .* is a file"):
            refused(tmp_path / "out")


def test_a_place_that_cannot_be_replaced_is_refused_unless_all_is_done(made, monkeypatch):
    monkeypatch.setattr(atomic, "_is_mounted", lambda folder: True)
    assert claim(made, "evaluation", MADE) == "finished"
    with pytest.raises(ValueError, match="mount point"):
        claim(made, "evaluation", {**MADE, "seed": 1}, overwrite=True)


def test_a_folder_that_is_filled_may_hold_anything_but_another_kind(tmp_path, made):
    assert check_kind(tmp_path / "new", "demo") == {} == check_kind(tmp_path, "demo")
    assert check_kind(made, "evaluation")["identity"] == MADE
    with pytest.raises(ValueError, match="not a demo folder; use another --out"):
        check_kind(made, "demo")


@pytest.mark.parametrize("features", [None, "pixels", ["pixels"], {"name": "other"}])
def test_an_index_of_damaged_features_is_another_one(tmp_path, features):
    write_manifest(tmp_path, "index", dataset_hash="a", features=features)
    with pytest.raises(ValueError, match="features.name is .* --overwrite"):
        claim_index(tmp_path, "a", {"name": "pixels"}, overwrite=False)
    assert claim_index(tmp_path, "a", {"name": "pixels"}, overwrite=True) == "open"


def test_a_difference_is_plain_text_on_one_line():
    found = json.loads('{"a\\nb\\u001b[2J": "x\\u202e"}')
    assert (first_difference(found, {}) or "").isprintable()
