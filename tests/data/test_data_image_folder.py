"""Folders of pictures: each file is used, refused by name, or counted among the left out."""

import json
import os

import pytest
from pictures import picture

from memfree.cli import entry
from memfree.commands.prepare import prepare
from memfree.data.ingest import Framing, ingest
from memfree.data.options import RecordOptions
from memfree.data.skipped import INCOMPLETE, LeftOut, Skipped
from memfree.data.sources import ImageFolder, SourceImage


@pytest.fixture
def put(tmp_path, encode):
    """Writes files below ``images``: pictures by number, texts, bytes; returns the folder."""
    folder = tmp_path / "images"

    def write(**files):
        for name, content in files.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, int):
                content = encode(picture(content))
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder

    return write


def load(folder, skipped=None, **options):
    """The images of a folder by name, and what was left out."""
    source = ImageFolder(folder, RecordOptions(**options))
    return {image.name: image for image in source.images(skipped)}, source.left_out


def captions(folder, **options):
    return {name: image.caption for name, image in load(folder, **options)[0].items()}


def refusal(folder, **options):
    """The message of stop; with skip, the rest is used and the same is said."""
    with pytest.raises((ValueError, OSError)) as stopped:
        load(folder, **options)
    skipped = Skipped()
    load(folder, skipped, **options)
    assert str(stopped.value) in skipped.messages
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints/a.png", "__MACOSX/a.png", "cat/._a.png"])
def test_hidden_folders_are_no_classes(put, hidden):
    folder = put(**{"cat/a.png": 0, "dog/a.png": 1, hidden: 2})
    images, left_out = load(folder)
    assert list(images) == ["cat/a.png", "dog/a.png"]
    assert ImageFolder(folder).class_names == ["cat", "dog"]
    assert left_out.count == 1 and left_out.first[0].startswith(hidden.split("/a.png")[0])


def test_other_files_are_counted(put):
    others = ["notes.md", "a.json", "README.txt", "IMG_0001", "cat.txt"]
    images, left_out = load(put(**{"a.png": 0, **dict.fromkeys(others, "words")}))
    assert images["a.png"].caption is None
    assert left_out.count == len(others) and sorted(left_out.first) == sorted(others)


@pytest.mark.parametrize("name", ["b.gif", "b.BMP", "b.tif", "b.avif", "b.heic"])
def test_pictures_in_other_formats_are_refused(put, name):
    folder = put(**{"a.png": 0, name: "x"})
    assert name in refusal(folder) and "--on_error skip" in refusal(folder)
    beside = put(**{name.replace("b.", "a."): "x"})
    (folder / name).unlink()
    assert load(beside)[1].first == [name.replace("b.", "a.")]


@pytest.mark.parametrize("name", ["a.jfif", "a.JPE", "a.apng", "a.JPG"])
def test_other_endings_of_the_formats_that_are_read(put, name):
    assert list(load(put(**{name: 0}))[0]) == [name]


@pytest.mark.parametrize("name", ["a.gif", ".x/a.png", "notes.md"])
def test_a_folder_without_pictures_says_what_is_there(put, name):
    with pytest.raises(FileNotFoundError, match=f"--path: no PNG.*{name.split('/')[0]}"):
        ImageFolder(put(**{name: "x"}))


def test_links_are_followed(put, tmp_path, encode):
    folder = put(**{"cat/a.png": 0})
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "b.png").write_bytes(encode(picture(1)))
    (folder / "dog").symlink_to(tmp_path / "elsewhere")
    (folder / "cat" / "c.png").symlink_to(tmp_path / "elsewhere" / "deep" / "b.png")
    (folder / "cat" / "back").symlink_to(folder)
    (folder / "dog" / "self").symlink_to(tmp_path / "elsewhere")
    images, left_out = load(folder)
    assert list(images) == ["cat/a.png", "cat/c.png", "dog/deep/b.png"]
    assert images["dog/deep/b.png"].label == 1
    assert sorted(text.split(":")[0] for text in left_out.first) == ["cat/back", "dog/self"]


def test_what_is_no_file_is_refused(put):
    folder = put(**{"a.png": 0})
    (folder / "b.png").symlink_to(folder / "gone.png")
    (folder / "c.png").symlink_to(folder / "c.png")
    os.mkfifo(folder / "d.png")
    skipped = Skipped()
    images, left_out = load(folder, skipped)
    assert list(images) == ["a.png"] and skipped.records == 3
    assert [name in text for name, text in zip("bcd", skipped.messages, strict=True)] == [True] * 3
    assert "b.png: a broken link" in refusal(folder)


def test_folders_named_like_pictures(put):
    folder = put(**{"a.png/b.png": 0, "c/d.png": 1})
    (folder / "c" / "e.png").mkdir()
    images, left_out = load(folder)
    assert list(images) == ["a.png/b.png", "c/d.png"]
    assert left_out.first == ["c/e.png/: an empty folder"]


def test_spaces_and_joiners_of_all_kinds_are_kept(put):
    names = ["1.23\u202fPM.png", "a\u00a0b.png", "\U0001f469\u200d\U0001f4bb.png"]
    assert sorted(load(put(**{name: 0 for name in names}))[0]) == sorted(names)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("a\nb.png", "control"), ("a\x1b[2J.png", "control"), ("\udcff.png", "UTF-8")],
)
def test_names_that_cannot_be_shown_are_refused(put, name, reason):
    assert reason in refusal(put(**{"1.png": 0, name: 1}))


@pytest.mark.parametrize(
    "content",
    [
        "café".encode(),
        "café".encode("utf-8-sig"),
        "café".encode("utf-16"),
        b"\xfe\xff" + "café".encode("utf-16-be"),
        "café".encode("utf-32"),
    ],
)
@pytest.mark.parametrize("name", ["IMG_1.TXT", "IMG_1.txt", "IMG_1.caption", "IMG_1.Caption"])
def test_captions_beside_pictures(put, content, name):
    assert captions(put(**{"IMG_1.JPG": 0, name: content})) == {"IMG_1.JPG": "café"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("café".encode("latin-1"), "UTF-8"),
        ("cafe".encode("utf-16-le"), "NUL"),
        (b"a\0", "NUL"),
        ("a\ufffd".encode(), "U\\+FFFD"),
        (b"x" * (2 << 20), "limit"),
    ],
)
def test_captions_that_are_refused(put, content, message):
    folder = put(**{"a.png": 0, "a.txt": content, "b.png": 1, "b.txt": "words"})
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert "a.txt" in str(error.value)
    assert list(load(folder, Skipped())[0]) == ["b.png"]


METADATA = {
    "metadata.jsonl": """{"file_name": "a.png", "text": "one"}\n
        {"file_name": "x/b.png", "text": 2}""",
    "metadata.csv": 'file_name,caption\na.png,one\n./x/b.png,"2"\n',
    "Metadata.CSV": "\ufefffile_name,text\r\na.png,one\r\nx/b.png,2\r\n",
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_as_hugging_face_writes_it(put, name):
    folder = put(**{"c/a.png": 0, "c/x/b.png": 1, f"c/{name}": METADATA[name]})
    assert captions(folder) == {"c/a.png": "one", "c/x/b.png": "2"}
    assert not load(folder)[1]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ('{"file_name": "a.png", "text": "x"}', "b.png: other images have a caption"),
        ('{"file_name": "c.png", "text": "x"}', "line 1: there is no picture c.png"),
        ('{"file_name": "../a.png", "text": "x"}', "line 1: there is no picture ../a.png"),
    ],
)
def test_metadata_and_pictures_that_do_not_fit(put, metadata, message):
    folder = put(**{"a.png": 0, "b.png": 1, "metadata.jsonl": metadata})
    skipped = Skipped()
    load(folder, skipped)
    assert any(message in text for text in skipped.messages)
    with pytest.raises((ValueError, OSError)):
        load(folder)


@pytest.mark.parametrize(
    ("name", "metadata", "message"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{', "line 2"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": ["x"]}', "line 1: its caption"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": Infinity}', "line 1: its caption"),
        ("metadata.jsonl", '{"file_name": 7, "text": "x"}', "line 1"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "x", "caption": "y"}',
            "columns text and",
        ),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "x"}\n' * 2 + '{"file_name": "a.png", "text": "y"}',
            "line 3: another caption",
        ),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x", "text": "y"}', "line 1: its capt"),
        ("metadata.jsonl", '{"file_name": "a.png", "file_name": "b.png"}', "line 1: not an object"),
        ("metadata.csv", "file_name,text,text\na.png,x,y\n", "2 columns text"),
        ("metadata.csv", "file_name,file_name,text\na.png,b.png,x\n", "2 columns file_name"),
        ("metadata.csv", "file_name,text\na.png\n", "line 2"),
        ("metadata.csv", "file_name,text\na.png,x,y\n", "line 2"),
        ("metadata.csv", b"file_name,text\na.png,caf\xe9\n", "UTF-8"),
        ("metadata.parquet", "PAR1", "metadata.jsonl or metadata.csv"),
    ],
)
def test_metadata_that_is_refused(put, name, metadata, message):
    with pytest.raises(ValueError, match=message) as error:
        ImageFolder(put(**{"a.png": 0, name: metadata}))
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["file_name,text\n", "", "\n"])
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_without_rows_is_counted(put, name, text):
    text = "" if name == "metadata.jsonl" else text
    _, left_out = load(put(**{"a.png": 0, name: text}))
    assert left_out.text() == f"left out: 1 ({name}: no rows)"


@pytest.mark.parametrize("name", ["b.png", "a.txt", "metadata.csv", "metadata.jsonl"])
def test_what_the_disk_does_not_give_is_named(put, name):
    folder = put(**{"a.png": 0})
    (folder / name).symlink_to("/proc/self/mem")  # whose reading fails, as that of a bad sector
    with pytest.raises(OSError, match=name):
        load(folder)


def test_metadata_without_captions_is_counted(put):
    for text in ("url,width\nx,1\n", "file_name,url\na.png,x\n"):
        images, left_out = load(put(**{"a.png": 0, "metadata.csv": text}))
        assert images["a.png"].caption is None and "metadata.csv" in left_out.text()
    _, left_out = load(put(**{"metadata.csv": "file_name,text,label\na.png,x,1\n"}))
    assert "not read: label" in left_out.text()


@pytest.mark.parametrize("other", ["a.caption", "metadata.jsonl"])
def test_which_caption_is_meant(put, other):
    text = "two" if other == "a.caption" else '{"file_name": "a.png", "text": "two"}'
    folder = put(**{"a.png": 0, "a.txt": "one", other: text})
    message = refusal(folder)
    assert "--records.caption_source" in message and "a.png" in message
    kind = "caption" if other == "a.caption" else "metadata"
    assert captions(folder, caption_source="txt") == {"a.png": "one"}
    assert captions(folder, caption_source=kind) == {"a.png": "two"}
    assert captions(folder, caption_source="none") == {"a.png": None}
    assert load(folder, caption_source="none")[1].count == 2
    put(**{other: text.replace("two", "one")})
    assert captions(folder) == {"a.png": "one"}


def test_a_mask_is_no_picture(put):
    folder = put(**{"k.jpg": 0, "k.png": 1, "k.txt": "words"})
    assert "--records.image_suffix" in refusal(folder)
    images, left_out = load(folder, image_suffix="jpg")
    assert {name: image.caption for name, image in images.items()} == {"k.jpg": "words"}
    assert left_out.first == ["k.png"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--records.image_suffix=jpg"],
        ["--source=folder", "--path=x", "--records.key_ends=last_dot"],
        ["--source=folder", "--path=x", "--records.caption_source=json"],
        ["--source=shards", "--path=x", "--records.caption_source=metadata"],
    ],
)
def test_options_without_meaning_are_refused(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        entry.main(["prepare", f"--out={tmp_path / 'out'}", *arguments])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and arguments[-1].split("=")[0] in error


def test_summary_and_manifest(put, tmp_path, capsys):
    folder = put(**{f"{number}.png": number for number in range(20)}, **{"b.gif": "x", "n.md": "x"})
    with pytest.raises(ValueError, match=r"b\.gif"):
        prepare(tmp_path / "out", "folder", str(folder))
    assert prepare(tmp_path / "out", "folder", str(folder), on_error="skip") == INCOMPLETE
    line = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 21 images skipped" in line and "b.gif" in line and "left out: 1 (n.md)" in line
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["left_out"] == {"count": 1, "first": ["n.md"]}
    assert "b.gif" in manifest["skipped"]["first"][0]


def test_a_foreign_picture_with_a_caption_is_counted_once(put):
    rows = "".join(f'{{"file_name": "{name}", "text": "x"}}\n' for name in ("a.png", "b.gif"))
    skipped = Skipped()
    load(put(**{"a.png": 0, "b.gif": "x", "metadata.jsonl": rows}), skipped)
    assert skipped.records == 1 and "only PNG, JPEG and WEBP" in skipped.messages[0]


def edit_caption(folder):
    (folder / "a" / "00.txt").write_text("other")


def move_between_classes(folder):
    (folder / "a" / "00.png").rename(folder / "b" / "x.png")
    (folder / "a" / "00.txt").rename(folder / "b" / "x.txt")


def rename_class(folder):
    (folder / "b").rename(folder / "c")


def edit_pixels_but_neither_size_nor_age(folder):
    file = folder / "a" / "00.png"
    stat = file.stat()
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def remove_all_pictures(folder):
    for file in folder.rglob("*.png"):
        file.unlink()


@pytest.mark.parametrize(
    "change",
    [
        edit_caption,
        move_between_classes,
        rename_class,
        edit_pixels_but_neither_size_nor_age,
        remove_all_pictures,
    ],
)
def test_a_changed_folder_is_not_called_done(put, tmp_path, capsys, change):
    files = {
        f"{name}/{number:02d}": 20 * (name == "b") + number for name in "ab" for number in range(20)
    }
    folder = put(
        **{f"{name}.png": number for name, number in files.items()},
        **{f"{name}.txt": f"text {number}" for name, number in files.items()},
    )
    prepare(tmp_path / "out", "folder", str(folder))
    prepare(tmp_path / "out", "folder", str(folder))
    for file in folder.rglob("*"):
        os.utime(file)  # looked at again, and found to be the same
    (folder / "a" / "notes.md").write_text("no part of the data set")
    assert prepare(tmp_path / "out", "folder", str(folder)) == 0  # though notes.md is left out
    assert capsys.readouterr().err.count("already prepared") == 2
    change(folder)
    with pytest.raises(ValueError, match="--path .* changed after .*--overwrite"):
        prepare(tmp_path / "out", "folder", str(folder))


def test_a_rewritten_shard_is_not_called_done(tmp_path, tar, encode, capsys):
    members = [(f"{number}.png", encode(picture(number))) for number in range(20)]
    shard = tar(tmp_path / "0.tar", members)
    prepare(tmp_path / "out", "shards", str(shard))
    stat = shard.stat()
    shard.write_bytes(shard.read_bytes())
    prepare(tmp_path / "out", "shards", str(shard))
    assert capsys.readouterr().err.count("already prepared") == 1
    tar(shard, [("x" + name[1:], data) for name, data in members])
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert shard.stat().st_size == stat.st_size
    with pytest.raises(ValueError, match="changed after"):
        prepare(tmp_path / "out", "shards", str(shard))


def test_folders_of_earlier_versions_are_still_done(put, tmp_path, capsys):
    folder = put(**{f"{number}.png": number for number in range(20)})
    prepare(tmp_path / "out", "folder", str(folder))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    del manifest["source"]["hash"], manifest["source"]["files_hash"], manifest["left_out"]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    prepare(tmp_path / "out", "folder", str(folder))
    assert "already prepared" in capsys.readouterr().err


def test_names_stay_unique(put, tmp_path, tar, encode):
    class Source:
        class_names = None
        left_out = LeftOut()

        def images(self, skipped):
            for number, name in enumerate(["a", "a", "a#1", "a"]):
                yield SourceImage(name, picture(number).transpose(2, 0, 1))

    data = ingest(Source(), Framing(None, None, None), tmp_path / "px", None)
    assert data.names == ["a", "a#1", "a#1#1", "a#2"]
