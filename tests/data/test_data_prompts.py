"""Prompt sets of a dataset, and prompt files."""

import numpy as np
import pytest

from memfree.commands.prepare import prepare
from memfree.data import DatasetFolder, DuplicationPlan, PartSizes
from memfree.data.prompts import prompt_set, read_prompts

SIZES = PartSizes(train=20, calibration=4, test=10, fit=0)


def pictures(folder, encode, caption, count=34):
    """Random pictures; ``caption`` gives the caption of each number."""
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3)).astype(np.uint8)
        (folder / f"{number:02d}.png").write_bytes(encode(pixels))
        (folder / f"{number:02d}.txt").write_text(caption(number))
    return str(folder)


def prepared(tmp_path, encode, caption, plan, sizes=SIZES):
    source = pictures(tmp_path / "source", encode, caption)
    prepare(tmp_path / "out", "folder", source, parts=sizes, plan=plan)
    return DatasetFolder(tmp_path / "out")


def captions_of(folder, part, chosen=lambda copies: True):
    """By way of the records, in order of rows."""
    copies = folder.items["copies"].to_pylist()
    records = sorted(folder.part_records(part).to_pylist(), key=lambda record: record["row"])
    found = [record["caption"] for record in records if chosen(copies[record["row"]])]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("policy", ["same", "unique", "key"])
def test_three_sets(tmp_path, encode, policy):
    plan = DuplicationPlan(images=4, factor=5, conditions=policy)
    # every caption belongs to two images, so that sets could meet
    folder = prepared(tmp_path, encode, lambda number: f"thing {number // 2}", plan)
    duplicated, other, unseen = (
        prompt_set(folder, name) for name in ("duplicated", "other", "unseen")
    )
    assert set(duplicated) == set(captions_of(folder, "train", lambda copies: copies > 1))
    trained = captions_of(folder, "train")
    single = captions_of(folder, "train", lambda copies: copies == 1)
    assert other == [text for text in single if text not in duplicated]
    assert unseen == [text for text in captions_of(folder, "test") if text not in trained]
    sets = [set(duplicated), set(other), set(unseen)]
    assert [len(prompts) for prompts in (duplicated, other, unseen)] == [len(one) for one in sets]
    assert sum(map(len, sets)) == len(set.union(*sets))
    assert duplicated == prompt_set(DatasetFolder(tmp_path / "out"), "duplicated")
    if policy == "key":
        assert len(duplicated) == 4 and all(len(text.split()) == 3 for text in duplicated)


def test_near_copies_and_duplicates_of_the_source_count(tmp_path, encode):
    plan = DuplicationPlan(images=2, factor=3, kinds=["brightness"])
    source = tmp_path / "source"
    pictures(source, encode, lambda number: f"thing {number}")
    mirrored = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)[:, ::-1]
    (source / "zz.png").write_bytes(encode(mirrored))
    (source / "zz.txt").write_text("thing 0 in a mirror")
    sizes = PartSizes(train=35, calibration=0, test=0, fit=0)
    prepare(tmp_path / "out", "folder", str(source), parts=sizes, plan=plan)
    folder = DatasetFolder(tmp_path / "out")
    near = {key.split("~")[0] for key in folder.items["image_key"].to_pylist() if "~" in key}
    expected = {f"thing {int(key[:2])}" for key in near} | {"thing 0", "thing 0 in a mirror"}
    assert len(near) == 2 and set(prompt_set(folder, "duplicated")) == expected
    planned = prompt_set(folder, "duplicated", least_records=3)
    assert set(planned) == {f"thing {int(key[:2])}" for key in near}
    assert {"thing 0", "thing 0 in a mirror"} <= set(prompt_set(folder, "other", least_records=3))
    with pytest.raises(ValueError, match="no duplicated prompts: no training image has 4 records"):
        prompt_set(folder, "duplicated", least_records=4)
    with pytest.raises(ValueError, match="least_records 1: use 2 or more"):
        prompt_set(folder, "duplicated", least_records=1)
    with pytest.raises(ValueError, match="no unseen prompts: .*or it has no test part"):
        prompt_set(folder, "unseen")


def test_empty_sets_are_refused(tmp_path, encode, digits_folder):
    folder = prepared(tmp_path, encode, lambda number: "thing", DuplicationPlan())
    with pytest.raises(ValueError, match=r"no duplicated prompts: .*--plan.images"):
        prompt_set(folder, "duplicated")
    with pytest.raises(ValueError, match="no unseen prompts: every caption"):
        prompt_set(folder, "unseen")
    assert prompt_set(folder, "other") == ["thing"]
    plan = DuplicationPlan(images=1, factor=2)
    source = str(tmp_path / "source")
    prepare(tmp_path / "repeated", "folder", source, parts=SIZES, plan=plan)
    with pytest.raises(ValueError, match="no other prompts: every training caption"):
        prompt_set(DatasetFolder(tmp_path / "repeated"), "other")
    with pytest.raises(ValueError, match="has no captions; prepare captioned data"):
        prompt_set(DatasetFolder(digits_folder), "other")
    with pytest.raises(
        ValueError, match="'seen' is not a prompt set; use duplicated, other, unseen"
    ):
        prompt_set(folder, "seen")


def test_prompt_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa café\r\n\n  two words \nsame\nsame".encode())
    assert read_prompts(path) == ["a café", "two words", "same", "same"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no prompt file at"),
        (b"", "has no prompts; write one a line"),
        (b" \n\r\n", "has no prompts; write one a line"),
        (b"\x89PNG\r\n\xff", "is not UTF-8 text"),
        (b"a\0b", "zero bytes"),
    ],
)
def test_prompt_files_that_are_none(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
