"""Names of records and shards: where a key ends, what is hidden, and what is no name."""

import re

import pytest
from webdataset.tariterators import base_plus_ext

from memfree.data.file_names import is_hidden, is_tar, problem_with, shard_labels, split_name


@pytest.mark.parametrize(
    "name",
    ["k.jpg", "k.seg.png", "a/k.jpg", "v1.0/k.JPG", "./k.txt", "a/b.c/d.e.f", "k.", "a b.jpg"],
)
def test_the_first_dot_is_the_rule_of_webdataset(name):
    key, suffix = base_plus_ext(name)
    assert split_name(name, "first_dot") == (key, suffix.lower())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0002.v2.JPG", ("0002.v2", "jpg")),
        ("a.b/k.jpg", ("a.b/k", "jpg")),
        ("a.b/k", ("a.b/k", "")),
        ("IMG 2024-01-01 at 1.23.45\u202fPM.png", ("IMG 2024-01-01 at 1.23.45\u202fPM", "png")),
    ],
)
def test_the_last_dot(name, expected):
    assert split_name(name, "last_dot") == expected


@pytest.mark.parametrize(
    "name", [".ipynb_checkpoints/a.png", "cat/._a.png", "__MACOSX/cat/a.png", "@eaDir/a.jpg"]
)
def test_hidden(name):
    assert is_hidden(name)
    assert not is_hidden(f"./{re.sub(r'[._@]', '', name)}.png")


@pytest.mark.parametrize(
    "name",
    [
        "a\u202fb",  # narrow no-break space, in the names of screenshots
        "a\u00a0b",
        "\U0001f469\u200d\U0001f4bb",  # joined by U+200D
        "می\u200cخواهم",
        "\u3000",
        "a\u00adb",
        "\U0001fae8",  # newer than the Unicode of some versions of Python
        "a\ufe0fb",
    ],
)
def test_any_text_may_be_a_name(name):
    assert problem_with(name) is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a\nb", "control"),
        ("\x1b[2J", "control"),
        ("\x85", "control"),
        ("a\u2028b", "control"),
        ("\udcff", "UTF-8"),
        ("/a", "absolute"),
        ("a/../b", "climbs"),
        ("a" * 5000, "5000"),
    ],
)
def test_what_is_no_name_is_said(name, reason):
    assert reason in problem_with(name)


def test_shards_of_one_name_are_told_apart():
    assert shard_labels(["x/00000.tar", "x/00001.tar.gz"]) == ["00000", "00001"]
    assert shard_labels(["x/0.tar", "y/0.tar", "y/1.tar"]) == ["x/0", "y/0", "1"]
    assert shard_labels(["x/a.v1.tar", "x/a.v2.tgz"]) == ["a.v1", "a.v2"]
    assert shard_labels(["p/x/0.tar", "q/x/0.tar"]) == ["p/x/0", "q/x/0"]
    assert shard_labels(["x/0.tar", "x/0.tar"])[0] == shard_labels(["x/0.tar", "x/0.tar"])[1]
    assert shard_labels(["x/0.tgz", "x/0.tar"]) == ["x/0.tgz", "x/0.tar"]


@pytest.mark.parametrize("name", ["0.tar", "0.tar.gz", "0.TGZ", "0.txz", "0.tar.bz2"])
def test_shards(name):
    assert is_tar(name) and not is_tar(f"{name}.md5") and not is_tar(f"{name}.sha256")
