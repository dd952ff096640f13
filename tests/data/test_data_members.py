"""Members of shards: each is part of a record, refused by name, or counted among the left out."""

import gzip
import io
import json
import os
import random
import tarfile

import pytest
from epochs import epoch_of
from pictures import picture
from PIL import Image

from memfree.commands.prepare import prepare
from memfree.data import ShardDataModule, StreamOptions
from memfree.data.batches import ForeignBatches, RankOptions
from memfree.data.file_names import split_name
from memfree.data.options import RecordOptions
from memfree.data.shard_reader import expand_shards, read_members, read_shard
from memfree.data.skipped import LeftOut, Skipped
from memfree.folders.untrusted import short


@pytest.fixture
def png(encode):
    """PNGs by number."""
    return lambda number: encode(picture(number))


def read(shard, **options):
    """Records by key, and what was left out."""
    left_out = LeftOut()
    records = list(read_shard(str(shard), None, left_out, RecordOptions(**options)))
    assert len({record.name for record in records}) == len(records)
    return {record.name.partition("/")[2]: record for record in records}, left_out


def refusal(shard, **options):
    """The message of stop, which must be what is counted with skip too."""
    with pytest.raises((ValueError, OSError)) as stopped:
        read(shard, **options)
    skipped = Skipped()
    list(read_shard(str(shard), skipped, None, RecordOptions(**options)))
    assert skipped and skipped.messages[0] == str(stopped.value)
    return str(stopped.value)


def test_names_with_dots_are_asked_about(tmp_path, tar, png):
    members = [("1.png", png(1)), ("1.txt", b"one"), ("2.v2.PNG", png(2)), ("2.v2.txt", b"two")]
    shard = tar(tmp_path / "a.tar", members)
    message = refusal(shard)
    assert "2.v2.PNG" in message and "--records.key_ends last_dot" in message
    assert "--records.image_suffix v2.png" in message
    records, left_out = read(shard, key_ends="last_dot")
    assert {key: record.caption for key, record in records.items()} == {"1": "one", "2.v2": "two"}
    assert records["2.v2"].image == png(2) and not left_out
    assert "2" in refusal(shard, key_ends="first_dot")


def test_further_parts_of_a_sample_are_counted(tmp_path, tar, png):
    members = [("1.png", png(1)), ("1.seg.png", png(2)), ("1.npy", b"x"), ("1.gif", b"x")]
    shard = tar(tmp_path / "a.tar", members)
    records, left_out = read(shard)
    assert records["1"].image == png(1)
    assert left_out.count == 3
    assert all(name in left_out.text() for name in ("1.seg.png", "1.npy", "1.gif"))
    assert read(shard, image_suffix="seg.png")[0]["1"].image == png(2)


@pytest.mark.parametrize("members", [["jpg", "png"], ["png", "jpg"], ["jpeg", "webp", "jpg"]])
def test_which_picture_of_several_is_asked(tmp_path, tar, png, members):
    content = {suffix: png(number) for number, suffix in enumerate(members)}
    shard = tar(tmp_path / "a.tar", [(f"k.{suffix}", data) for suffix, data in content.items()])
    message = refusal(shard)
    assert "--records.image_suffix" in message and "a/k" in message
    for chosen in ("jpg", ".JPG"):
        records, left_out = read(shard, image_suffix=chosen)
        assert records["k"].image == content["jpg"] and left_out.count == len(members) - 1


@pytest.mark.parametrize("second", ["1.png", "1.PNG", "1.txt"])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_two_members_of_one_name(tmp_path, tar, png, second, apart, packed):
    members = [("1.png", png(0)), ("1.txt", b"text"), *([("2.png", png(1))] if apart else [])]
    shard = tar(tmp_path / "a.tar", [*members, (second, b"text")])
    if packed:
        (tmp_path / "a.tgz").write_bytes(gzip.compress(shard.read_bytes()))
        shard = tmp_path / "a.tgz"
    expected = "sample 1 do not stand together" if apart and packed else "a/1: two members"
    assert expected in refusal(shard)


def test_files_of_a_sample_that_stand_apart(tmp_path, tar, png):
    members = [(f"{number}.png", png(number)) for number in range(3)]
    members += [(f"{number}.txt", b"text %d" % number) for number in range(3)]
    shard = tar(tmp_path / "a.tar", members)
    records, left_out = read(shard)
    assert [record.caption for record in records.values()] == ["text 0", "text 1", "text 2"]
    assert [record.image for record in records.values()] == [png(number) for number in range(3)]
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    message = refusal(packed)
    assert "sample 0 do not stand together" in message and str(packed) in message
    assert list(read_shard(str(packed), Skipped())) == []  # none of them without its caption


def test_remote_shards_that_are_scattered_are_never_skipped(tmp_path, tar, png, monkeypatch):
    """They cannot be looked at beforehand: pictures would be used without their captions."""
    shard = tar(tmp_path / "a.tar", [("1.png", png(0)), ("2.png", png(1)), ("1.txt", b"text")])
    monkeypatch.setattr("memfree.data.shard_reader.gopen", lambda address, mode: shard.open(mode))
    with pytest.raises(OSError, match="sample 1 do not stand together"):
        list(read_shard("https://host/a.tar", Skipped()))


def test_captions_are_kept_though_records_are_skipped(tmp_path, tar, png):
    members = [(f"{number}.png", png(number)) for number in range(20)] + [("x.png", b"broken")]
    members += [(f"{number}.txt", b"text") for number in range(20)]
    tar(tmp_path / "a.tar", members)
    prepare(tmp_path / "out", "shards", str(tmp_path / "a.tar"), on_error="skip")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["captions"] and manifest["grouping"]["source_images"] == 20


def test_folders_in_tars_are_part_of_the_key(tmp_path, tar, png):
    shard = tar(tmp_path / "a.tar", [("a.b/k.png", png(0)), ("b/k.JPG", png(1)), ("k.png", png(2))])
    assert list(read(shard)[0]) == ["a.b/k", "b/k", "k"]


def test_long_names_are_kept(tmp_path, tar, png):
    names = ["x" * 200 + end for end in "abc"]
    shard = tar(tmp_path / "a.tar", [(f"{name}.png", png(0)) for name in names])
    assert list(read(shard)[0]) == names
    shard = tar(tmp_path / "b.tar", [("y" * 5000 + ".png", png(0))])
    assert "5004 characters" in refusal(shard)


def test_spaces_and_joiners_of_all_kinds_are_kept(tmp_path, tar, png):
    names = ["a\u202fb", "a\u00a0b", "a\u200db", "a\u3000b"]
    shard = tar(tmp_path / "a.tar", [(f"{name}.png", png(0)) for name in names])
    assert list(read(shard)[0]) == names


def test_hidden_and_unknown_members_are_counted(tmp_path, tar, png):
    others = ["._1.png", "__MACOSX/._1.png", "README", "inner.tar", ".x/2.png", "a.json5"]
    shard = tar(tmp_path / "a.tar", [("1.png", png(0)), *((name, b"x") for name in others)])
    records, left_out = read(shard)
    assert list(records) == ["1"] and left_out.count == len(others)
    assert [text.split(":")[0] for text in left_out.first] == [f"a/{name}" for name in others]


def test_pictures_of_other_formats_are_refused_by_name(tmp_path, tar):
    shard = tar(tmp_path / "a.tar", [("1.gif", b"GIF89a"), ("1.txt", b"text")])
    assert "a/1" in refusal(shard) and ".gif" in refusal(shard)


def test_tars_that_were_joined_are_noticed(tmp_path, tar, png):
    first, second = (tar(tmp_path / f"{n}.tar", [(f"{n}.png", png(n))]) for n in range(2))
    joined = tmp_path / "joined.tar"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    assert "continues after its end" in refusal(joined)
    packed = tmp_path / "joined.tgz"
    packed.write_bytes(gzip.compress(joined.read_bytes()))
    assert "continues after its end" in refusal(packed)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"txt": b"\xef\xbb\xbfcaf\xc3\xa9"}, "café"),
        ({"txt": "café".encode("utf-16")}, "café"),
        ({"caption": b"words"}, "words"),
        ({"TXT": b"words"}, "words"),
        ({"txt": b"words\n", "caption": b"words"}, "words\n"),
        ({"txt": b""}, ""),
        ({"json": b'\xef\xbb\xbf{"caption": "words"}'}, "words"),
        ({"json": b'{"caption": 7}'}, "7"),
        ({"json": b'{"caption": "words", "clip": NaN, "w": Infinity}'}, "words"),
        ({"json": b'{"caption": "words", "id": 123456789012345678901}'}, "words"),
        ({"json": b'{"caption": "words", "sum": %s}' % (b"9" * 5000)}, "words"),
        ({"json": b'{"caption": -123456789012345678901}'}, "-123456789012345678901"),
        ({"json": b'{"caption": NaN}'}, None),
        ({"json": b'{"caption": "words", "label": NaN}'}, "words"),
        ({"json": b'{"caption": "words", "label": NaN}', "cls": b"3"}, "words"),
        ({"json": b'{"caption": null}'}, None),
        ({"json": b'{"caption": "words", "label": "cat"}', "cls": b"3"}, "words"),
    ],
)
def test_captions_are_read(tmp_path, tar, png, members, expected):
    shard = tar(
        tmp_path / "a.tar", [("1.png", png(0)), *((f"1.{k}", v) for k, v in members.items())]
    )
    assert read(shard)[0]["1"].caption == expected


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"txt": "café".encode("latin-1")}, "UTF-8"),
        ({"txt": "café".encode("utf-16")[2:]}, "NUL|UTF-8"),
        ({"txt": "a\ufffdb".encode()}, "U\\+FFFD"),
        ({"txt": b"a\0b"}, "NUL"),
        ({"json": b'{"caption": "a\\u0000b"}'}, "NUL"),
        ({"json": b'{"caption": "a\\ufffdb"}'}, "U\\+FFFD"),
        ({"json": b'{"caption": Infinity}'}, "not text"),
        ({"json": b'{"caption": %s}' % (b"9" * 5000)}, "not text"),
        ({"json": b'{"caption": true}'}, "not text"),
        ({"json": b'{"label": 123456789012345678901}'}, "class 12345"),
        ({"json": b'{"label": %s}' % (b"9" * 4000)}, "class 9999"),
        ({"json": b'{"label": %s}' % (b"1" + b"0" * 22)}, "class 1000"),
        ({"cls": b"1", "json": b'{"label": %s}' % (b"9" * 4000)}, "is 1 in .cls, but 99"),
        ({"txt": b"one", "json": b'{"caption": "two"}'}, "--records.caption_source"),
        ({"txt": b"one", "caption": b"two"}, "--records.caption_source"),
        ({"cls": b"1", "json": b'{"label": 2}'}, "class is 1 in .cls, but 2"),
        ({"cls": b"1", "json": b'{"label": "2"}'}, "class is 1 in .cls, but 2"),
        ({"cls": b"1", "json": b'{"label": 2.0}'}, "class is 1 in .cls, but 2.0"),
        ({"cls": b"1", "json": b'{"label": 1, "label": 2}'}, "class is 1 in .cls, but 2"),
        ({"json": b'{"label": 1, "label": 2}'}, r"class \[1, 2\] is not a number"),
        ({"json": b'{"caption": "a", "caption": "b"}'}, r"\['a', 'b'\], not text"),
        ({"json": b'{"group": "a", "group": "b"}'}, "group is"),
        ({"json": b'{"label": "cat"}'}, "class 'cat' is not a number"),
        ({"json": b'{"group": ["a"]}'}, "group is"),
    ],
)
def test_captions_and_classes_that_are_refused(tmp_path, tar, png, members, message):
    shard = tar(
        tmp_path / "a.tar", [("1.png", png(0)), *((f"1.{k}", v) for k, v in members.items())]
    )
    with pytest.raises(ValueError, match=message) as error:
        read(shard)
    assert "a/1" in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("source", "caption"), [("txt", "one"), ("caption", "two"), ("json", "three"), ("none", None)]
)
def test_which_caption_is_meant(tmp_path, tar, png, source, caption):
    members = [("1.png", png(0)), ("1.txt", b"one"), ("1.caption", b"two")]
    shard = tar(tmp_path / "a.tar", [*members, ("1.json", b'{"caption": "three"}')])
    assert read(shard, caption_source=source)[0]["1"].caption == caption


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("7", "7"),
        ("7.0", "7"),
        ('"7"', "7"),
        ("123456789012345678901", "123456789012345678901"),
        ("NaN", None),
        ("null", None),
    ],
)
def test_groups_that_are_numbers(tmp_path, tar, png, group, expected):
    meta = b'{"group": %s}' % group.encode()
    shard = tar(tmp_path / "a.tar", [("1.png", png(0)), ("1.json", meta)])
    assert read(shard)[0]["1"].group == expected


@pytest.mark.parametrize("beside", ["0.tar.md5", "0.tar.sha256", "SHA256SUMS", "0.parquet"])
@pytest.mark.parametrize("pattern", ["", "*", "{0.tar,*}"])
def test_files_beside_shards_are_counted(tmp_path, tar, png, beside, pattern):
    tar(tmp_path / "0.tar", [("1.png", png(0))])
    (tmp_path / beside).write_bytes(b"0")
    left_out = LeftOut()
    shards = expand_shards(str(tmp_path / pattern), None, left_out)
    assert set(shards) == {str(tmp_path / "0.tar")}
    assert left_out.count == 1 and beside in left_out.text()


def test_a_pattern_for_shards_of_other_names_is_followed(tmp_path, tar, png):
    shards = [str(tar(tmp_path / f"part-{n}", [("1.png", png(0))])) for n in range(2)]
    assert expand_shards(str(tmp_path / "part-*")) == shards
    assert expand_shards(shards[0]) == shards[:1]


@pytest.mark.parametrize("ending", ["tar.gz", "tgz", "TAR", "tar.xz", "tar.bz2"])
def test_shards_of_every_ending(tmp_path, ending, png):
    mode = {"tar.gz": "w:gz", "tgz": "w:gz", "tar.xz": "w:xz", "tar.bz2": "w:bz2"}.get(ending, "w")
    with tarfile.open(tmp_path / f"0.{ending}", mode) as archive:
        info = tarfile.TarInfo("1.png")
        info.size = len(png(0))
        archive.addfile(info, io.BytesIO(png(0)))
    (shard,) = expand_shards(str(tmp_path))
    assert list(read(shard)[0]) == ["1"]
    options = StreamOptions(epoch_records=1, image_size=8)
    (batch,) = epoch_of(ForeignBatches(str(tmp_path), options, RankOptions(1)))
    assert batch["key"] == ["0/1"]


def test_broken_links_to_shards_are_missing_shards(tmp_path, tar, png):
    tar(tmp_path / "0.tar", [("1.png", png(0))])
    (tmp_path / "1.tar").symlink_to(tmp_path / "gone.tar")
    (tmp_path / "2.tar").mkdir()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 shards is missing, the first is .*1\.tar"):
        expand_shards(str(tmp_path))
    left_out = LeftOut()
    os.mkfifo(tmp_path / "00.tar")
    with pytest.raises(FileNotFoundError, match=r"00\.tar \(not a plain file\)"):
        expand_shards(str(tmp_path))
    assert expand_shards(str(tmp_path), Skipped(), left_out) == [str(tmp_path / "0.tar")]
    assert "2.tar/" in left_out.text()


def test_empty_shards_are_damaged_shards(tmp_path):
    (tmp_path / "0.tar").touch()
    assert "0.tar" in refusal(tmp_path / "0.tar")


def test_shards_without_records_are_counted(tmp_path, tar, png):
    assert "no record" in read(tar(tmp_path / "0.tar", []))[1].text()
    shard = tar(tmp_path / "1.tar", [("1.img", png(0))])
    assert read(shard)[1].count == 2
    with pytest.raises(ValueError, match=r"no readable image.*1\.img"):
        prepare(tmp_path / "out", "shards", str(shard))
    options = StreamOptions(epoch_records=1, image_size=8)
    with pytest.raises(ValueError, match=r"no readable record.*1\.img"):
        epoch_of(ForeignBatches(str(shard), options, RankOptions(1)))


def animation(kind):
    """Two frames."""
    out = io.BytesIO()
    frames = [Image.fromarray(picture(number)) for number in range(2)]
    frames[0].save(out, kind, save_all=True, append_images=frames[1:])
    return out.getvalue()


@pytest.mark.parametrize("key_ends", ["ask", "first_dot", "last_dot"])
def test_every_member_of_random_shards_is_accounted_for(tmp_path, tar, png, key_ends):
    """In a record of its key, in a sample that is refused by its key, or left out by its name."""
    draw = random.Random(0)
    stems = ["k", "a/k", "a.b/k", "k.v2", "._k", ".x/k", "k\u202f", "K", "__MACOSX/k", "k..x", "-"]
    suffixes = ["png", "jpg", "JPG", "jpeg", "seg.png", "gif", "npy", "tar"]
    suffixes += ["txt", "TXT", "caption", "json", "cls"]
    content = {"txt": b"t", "caption": b"t", "json": b'{"caption": "t"}', "cls": b"1"}
    for _ in range(100):
        names = [f"{draw.choice(stems)}.{draw.choice(suffixes)}" for _ in range(6)]
        members = [(name, content.get(name.rpartition(".")[2].lower(), png(0))) for name in names]
        shard = tar(tmp_path / "s.tar", [*members, ("README", b"words")])
        skipped, left_out = Skipped(), LeftOut()
        options = RecordOptions(key_ends=key_ends)
        records = read_shard(str(shard), skipped, left_out, options)
        used = {record.name for record in records}
        for name in [*names, "README"]:
            key, _ = split_name(f"s/{name}", "last_dot" if key_ends == "last_dot" else "first_dot")
            named = " ".join([*left_out.first, *skipped.messages])
            assert key in used or short(key) in named or short(name) in named, (name, names)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_later_frames_are_counted(tmp_path, tar, png, capsys, kind):
    members = [(f"{number}.png", png(number)) for number in range(19)]
    tar(tmp_path / "0.tar", [*members, (f"x.{kind.lower()}", animation(kind))])
    prepare(tmp_path / "out", "shards", str(tmp_path / "0.tar"), channels=3)
    assert "left out: 1 (0/x: 1 further frame)" in capsys.readouterr().err
    options = StreamOptions(epoch_records=20, image_size=8)
    data = ShardDataModule(str(tmp_path / "0.tar"), 10, stream=options)
    for _ in range(2):
        list(data.train_dataloader())
    assert data.left_out.first[0] == "0/x: 1 further frame"


def test_every_picture_of_a_shard(tmp_path, tar, png):
    names = ["1.png", "1.seg.png", "2.jpg", "2.png", "2.txt"]
    tar(tmp_path / "a.tar", [(name, png(0)) for name in names])
    left_out = LeftOut()
    found = read_members(
        str(tmp_path / "a.tar"), lambda name: name[-3:] in ("png", "jpg"), 10**6, None, left_out
    )
    assert [name for name, _ in found] == ["a/1", "a/1.seg", "a/2", "a/2.png"]
    assert left_out.first == ["a/2.txt"]


def test_captions_that_no_one_asked_for_do_not_matter(tmp_path, tar, png):
    members = [("1.png", png(0)), ("1.txt", b"\xff"), ("1.json", b'{"caption": ["a"]}')]
    tar(tmp_path / "0.tar", members)
    (batch,) = epoch_of(ForeignBatches(str(tmp_path), StreamOptions(1, 8), RankOptions(1)))
    assert "caption" not in batch
    with pytest.raises(ValueError, match="UTF-8"):
        epoch_of(ForeignBatches(str(tmp_path), StreamOptions(1, 8, captions=True), RankOptions(1)))


def test_streamed_shards_of_one_name_keep_their_pictures_apart(tmp_path, tar, png):
    for number, folder in enumerate("xy"):
        (tmp_path / folder).mkdir()
        tar(tmp_path / folder / "0.tar", [(f"{i}.png", png(4 * number + i)) for i in range(4)])
    options = StreamOptions(epoch_records=8, image_size=8)
    dataset = ForeignBatches(str(tmp_path / "{x,y}"), options, RankOptions(8))
    (batch,) = epoch_of(dataset)
    assert sorted(batch["key"]) == [f"{folder}/0/{i}" for folder in "xy" for i in range(4)]


def test_a_stream_says_what_it_leaves_out(tmp_path, tar, png):
    members = [m for i in range(4) for m in ((f"{i}.png", png(i)), (f"{i}.seg.png", png(9)))]
    tar(tmp_path / "0.tar", members)
    (tmp_path / "0.tar.md5").write_bytes(b"0")
    for workers in (0, 2):
        options = StreamOptions(epoch_records=4, image_size=8)
        data = ShardDataModule(str(tmp_path), 2, num_workers=workers, stream=options)
        for _ in range(3):
            assert all("left_out" not in batch for batch in data.train_dataloader())
        assert data.left_out.count == 5  # once each, however often they are met
        assert "0.tar.md5" in data.left_out.text()


def test_what_a_stream_asks_names_its_options(tmp_path, tar, png):
    tar(tmp_path / "0.tar", [("1.png", png(0)), ("1.jpg", png(1))])
    options = StreamOptions(epoch_records=1, image_size=8)
    with pytest.raises(ValueError, match="--data.stream.records.image_suffix"):
        epoch_of(ForeignBatches(str(tmp_path), options, RankOptions(1)))
    data = ShardDataModule(str(tmp_path), num_workers=1, stream=options)
    with pytest.raises(ValueError, match=r"^0/1 has 2 pictures.*jpg or png$"):
        list(data.train_dataloader())
    options = StreamOptions(1, 8, records=RecordOptions(image_suffix="png"))
    assert len(epoch_of(ForeignBatches(str(tmp_path), options, RankOptions(1)))) == 1


def test_the_summary_and_the_manifest_say_what_was_left_out(tmp_path, tar, png, capsys):
    members = [m for i in range(20) for m in ((f"{i}.png", png(i)), (f"{i}.npy", b"x"))]
    tar(tmp_path / "0.tar", members)
    prepare(tmp_path / "out", "shards", str(tmp_path / "0.tar"))
    assert "left out: 20 (0/0.npy; 0/1.npy; 0/2.npy; ...)" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["left_out"]["count"] == 20 and manifest["left_out"]["first"][0] == "0/0.npy"


def test_checkpoints_of_earlier_versions_are_of_the_same_stream(tmp_path, tar, png):
    """Their identity has no options of records; it changes with those that are given."""
    path = str(tar(tmp_path / "0.tar", [("1.png", png(0))]))
    plain = ShardDataModule(path, stream=StreamOptions(1, 8)).identity()
    assert "records" not in plain["stream"] and plain["stream"]["image_size"] == 8
    options = StreamOptions(1, 8, records=RecordOptions(image_suffix="png"))
    changed = ShardDataModule(path, stream=options).identity()
    assert changed["stream"]["records"]["image_suffix"] == "png"
