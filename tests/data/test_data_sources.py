"""Sources, decoding within limits, and framing."""

import bz2
import gzip
import io
import json
import lzma
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from memfree.data import decode
from memfree.data.decode import channels_of, encode_png, open_image, to_array, with_channels
from memfree.data.framing import Framing
from memfree.data.ingest import ingest
from memfree.data.skipped import Skipped
from memfree.data.sources import Digits, ImageFolder, Shards, open_source
from memfree.data.tarstream import expand_shards, read_shard


def picture(seed, height=10, width=10, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def load(source, tmp_path, framing=None, skipped=None):
    return ingest(source, framing or Framing(None, None, None), tmp_path / "px.tmp", skipped)


# decoding


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_round_trip_is_exact_and_repeatable(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (channels, 5, 7)).astype(np.uint8)
    data = encode_png(pixels)
    assert data == encode_png(pixels.copy())
    assert (to_array(open_image(data, "x")) == pixels).all()


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_header_is_checked_before_memory_is_taken(side):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    data += struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 0) + b"IEND\xaeB`\x82"
    with pytest.raises(ValueError, match="huge: more pixels than the limit"):
        open_image(data, "huge")


def test_other_formats_and_garbage_are_refused(encode, monkeypatch):
    for data in (b"", b"not an image", encode(picture(0), "GIF"), encode(picture(0), "TIFF")):
        with pytest.raises(ValueError, match="odd: not a PNG, JPEG or WEBP image"):
            open_image(data, "odd")
    with pytest.raises(ValueError, match="cut: damaged image"):
        open_image(encode(picture(0, 64, 64))[:-3000], "cut")
    monkeypatch.setattr(decode, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(ValueError, match="more than the limit 10"):
        open_image(encode(picture(0)), "long")


def test_channels_and_conversions():
    rgba = Image.fromarray(np.full((2, 2, 4), (200, 0, 0, 0), np.uint8))
    assert channels_of(rgba, "x") == 4
    assert to_array(with_channels(rgba, 3)).ravel().tolist() == [255] * 12  # all transparent: white
    assert to_array(with_channels(rgba, 1)).ravel().tolist() == [255] * 4
    grey = Image.fromarray(picture(1, channels=1))
    assert (to_array(with_channels(grey, 3)) == np.asarray(grey)).all()
    assert to_array(with_channels(grey, 2))[1].min() == 255
    with pytest.raises(ValueError, match="deep: mode I;16 is not 8 bits"):
        channels_of(Image.fromarray(np.zeros((2, 2), np.uint16)), "deep")


# framing


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_every_policy_gives_the_size(resize):
    framing = Framing(6, 9, 3, resize)
    for shape in ((30, 12), (12, 30), (3, 2), (6, 9)):
        image = Image.fromarray(picture(0, *shape))
        assert framing.apply(image, "x", framing).shape == (3, 6, 9)


def test_crop_keeps_the_centre_and_pad_keeps_all():
    wide = np.zeros((8, 16), np.uint8)
    wide[:, 4:12] = 200
    crop, pad, squash = (Framing(8, 8, 1, resize, "box") for resize in ("crop", "pad", "squash"))
    image = Image.fromarray(wide)
    assert (crop.apply(image, "x", crop) == 200).all()
    padded = pad.apply(image, "x", pad)[0]
    assert (padded[:2] == 0).all() and (padded[6:] == 0).all() and (padded[2:6, 2:6] == 200).all()
    assert squash.apply(image, "x", squash)[0].mean() == pytest.approx(100)


def test_nothing_is_converted_silently(tmp_path, encode):
    (tmp_path / "a.png").write_bytes(encode(picture(0)))
    (tmp_path / "b.png").write_bytes(encode(picture(1, channels=1)))
    with pytest.raises(ValueError, match="b.png: 1 channel, but the first image has 3"):
        load(ImageFolder(tmp_path), tmp_path)
    (tmp_path / "b.png").write_bytes(encode(picture(1, 11)))
    (tmp_path / "px.tmp").unlink()
    with pytest.raises(ValueError, match=r"b.png: 10 x 11 pixels.* --image_size"):
        load(ImageFolder(tmp_path), tmp_path)


# digits and folders


def test_digits(tmp_path):
    data = load(Digits(), tmp_path)
    assert data.pixels.shape == (1797, 1, 8, 8)
    assert data.pixels.min() == 0 and data.pixels.max() == 255
    assert data.num_classes(None) == 10 and data.captions is None


def test_class_folders(tmp_path, encode):
    for number, name in enumerate(("dog/a.png", "cat/deep/b.jpg", "dog/c.WEBP")):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(
            encode(
                picture(number),
                {"g": "PNG", "p": "WEBP"}.get(name[-1].lower())
                if not name.endswith("jpg")
                else "JPEG",
            )
        )
    (tmp_path / "dog" / "notes.md").write_text("no image")
    source = ImageFolder(tmp_path)
    assert source.class_names == ["cat", "dog"]
    data = load(source, tmp_path)
    assert data.names == ["cat/deep/b.jpg", "dog/a.png", "dog/c.WEBP"]
    assert data.labels == [0, 1, 1]


def test_captions_beside_images(tmp_path, encode):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(encode(picture(0)))
        (tmp_path / f"{name}.txt").write_text(f" the letter {name}\n")
    data = load(ImageFolder(tmp_path), tmp_path)
    assert data.captions == ["the letter a", "the letter b"] and data.labels is None
    (tmp_path / "b.txt").unlink()
    (tmp_path / "px.tmp").unlink()
    with pytest.raises(FileNotFoundError, match=r"b.png: other images have a caption, b.txt"):
        load(ImageFolder(tmp_path), tmp_path)


def test_folder_errors(tmp_path, encode):
    with pytest.raises(FileNotFoundError, match="--path: no image folder"):
        ImageFolder(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="--path: no PNG, JPEG or WEBP"):
        ImageFolder(tmp_path)
    (tmp_path / "class").mkdir()
    for name in ("a.png", "class/b.png"):
        (tmp_path / name).write_bytes(encode(picture(0)))
    with pytest.raises(ValueError, match="1 image outside of the class folders"):
        ImageFolder(tmp_path)


def test_unreadable_image_stops_or_is_counted(tmp_path, encode):
    (tmp_path / "a.png").write_bytes(encode(picture(0)))
    (tmp_path / "b.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"b.png: not a PNG"):
        load(ImageFolder(tmp_path), tmp_path)
    (tmp_path / "px.tmp").unlink()
    skipped = Skipped()
    data = load(ImageFolder(tmp_path), tmp_path, skipped=skipped)
    assert len(data.names) == 1 and "b.png" in skipped.messages[0]
    assert (skipped.records, skipped.kept, skipped.shards) == (1, 1, set())


def test_open_source_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="--source folder needs --path"):
        open_source("folder", None)
    with pytest.raises(ValueError, match="--path has no meaning"):
        open_source("digits", "somewhere")
    with pytest.raises(FileNotFoundError, match="no tar shards"):
        open_source("shards", str(tmp_path))


def test_cifar10_reads_both_parts(tmp_path, monkeypatch):
    class Fake:
        classes = ["plane", "car"]

        def __init__(self, root, train, download):
            count = 3 if train else 2
            self.data = np.stack([picture(seed, 32, 32) for seed in range(count)])
            self.targets = [seed % 2 for seed in range(count)]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    data = load(open_source("cifar10", str(tmp_path / "download")), tmp_path)
    assert data.names[0] == "cifar10-train-00000" and data.names[-1] == "cifar10-test-00001"
    assert (data.pixels[1] == picture(1, 32, 32).transpose(2, 0, 1)).all()

    def offline(*arguments, **options):
        raise RuntimeError("no\nnetwork")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", offline)
    with pytest.raises(OSError, match="CIFAR-10 could not be downloaded to .*: no network"):
        open_source("cifar10", str(tmp_path / "download"))


# shards


def test_img2dataset_shards(tmp_path, make_shard):
    for number in (1, 0):
        make_shard(tmp_path, number, 3)
    data = load(Shards(str(tmp_path)), tmp_path, Framing(8, 8, 3))
    assert data.names[0] == "00000/000000000" and len(data.names) == 6
    assert data.captions[4] == "picture 000010001"
    assert data.pixels.shape == (6, 3, 8, 8)


def test_classes_and_declared_groups_of_shards(tmp_path, tar, encode):
    meta = json.dumps({"image_key": "k", "group": "g", "label": 7}).encode()
    tar(
        tmp_path / "a.tar",
        [("x/0.png", encode(picture(0))), ("x/0.json", meta), ("x/0.seg.png", b"other")],
    )
    record = next(read_shard(str(tmp_path / "a.tar")))
    assert (record.label, record.group, record.image_key) == (7, "g", "k")
    tar(tmp_path / "b.tar", [("1.png", encode(picture(0))), ("1.cls", b"3\n")])
    assert next(read_shard(str(tmp_path / "b.tar"))).label == 3


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.txt", b"words")], "bad/1: record without a PNG"),
        ([("1.png", b"x"), ("1.cls", b"many")], "bad/1: class 'many' is not a number"),
        ([("1.png", b"x"), ("1.cls", b"-1")], "bad/1: class -1 is not in"),
        ([("1.png", b"x"), ("1.cls", b"99999999999")], "bad/1: class 99999999999 is not in"),
        ([("1.png", b"x"), ("1.json", b"{")], "bad/1: its .json is not valid"),
        ([("1.png", b"x"), ("1.json", b"[" * 100_000)], "bad/1: its .json is not valid"),
        ([("1.png", b"x"), ("1.txt", b"y" * (2 << 20))], r"bad/1: .txt has 2097152 bytes"),
    ],
)
def test_bad_records_are_named(tmp_path, tar, members, message):
    tar(tmp_path / "bad.tar", members)
    with pytest.raises(ValueError, match=message):
        list(read_shard(str(tmp_path / "bad.tar")))
    skipped = Skipped()
    assert list(read_shard(str(tmp_path / "bad.tar"), skipped)) == []
    assert skipped.records == 1 and not skipped.shards


@pytest.mark.parametrize("damage", ["cut in a member", "cut at a header", "garbage"])
def test_damaged_archives_are_named(tmp_path, make_shard, damage):
    shard = make_shard(tmp_path, 0, 5)
    data = shard.read_bytes()
    if damage == "cut in a member":
        data = data[:2000]
    elif damage == "cut at a header":
        data = data[: 512 * (data.rstrip(b"\0").rfind(b"ustar") // 512)]
    else:
        at = data.rfind(b"ustar") // 512 * 512
        data = data[:at] + b"\xff" * 512 + data[at + 512 :]
    shard.write_bytes(data)
    with pytest.raises(OSError, match="shard .*00000.tar: "):
        list(read_shard(str(shard)))
    skipped = Skipped()
    found = list(read_shard(str(shard), skipped))
    assert skipped.shards == {str(shard)} and skipped.records == 0 and len(found) < 5
    assert len(skipped.messages) == 1 and "00000.tar" in skipped.messages[0]


def test_names_in_archives_are_not_paths(tmp_path, tar, encode):
    shard = tar(tmp_path / "evil.tar", [("../../../etc/evil.png", encode(picture(0)))])
    data = load(Shards(str(shard)), tmp_path)
    assert data.names == ["evil/../../../etc/evil"]  # a key, and nothing is written by it
    assert {file.name for file in tmp_path.iterdir()} == {"evil.tar", "px.tmp"}


def test_links_in_archives_are_not_followed(tmp_path, encode):
    with tarfile.open(tmp_path / "link.tar", "w") as archive:
        link = tarfile.TarInfo("1.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        image = encode(picture(0))
        info = tarfile.TarInfo("1.png")
        info.size = len(image)
        archive.addfile(info, io.BytesIO(image))
    assert next(read_shard(str(tmp_path / "link.tar"))).caption is None


def test_shard_patterns(tmp_path, make_shard):
    for number in range(3):
        make_shard(tmp_path, number, 1)
    names = [str(tmp_path / f"0000{number}.tar") for number in range(3)]
    assert expand_shards(str(tmp_path)) == names
    assert expand_shards(str(tmp_path / "0000[01].tar")) == names[:2]
    assert expand_shards(str(tmp_path / "{00000..00002}.tar")) == names
    assert expand_shards("https://host/{00..02}.tar")[2] == "https://host/02.tar"


@pytest.mark.parametrize("address", ["pipe:rm -rf x", "https://host/a b.tar", "file:///a.tar"])
def test_addresses_run_nothing(address):
    with pytest.raises(ValueError, match="is no shard address"):
        expand_shards(address)


def test_a_file_whose_name_is_a_command_is_read_as_a_file(tmp_path, make_shard, monkeypatch):
    make_shard(tmp_path, 0, 1)
    (tmp_path / "00000.tar").rename(tmp_path / "pipe:touch run; cat 00000 #.tar")
    monkeypatch.chdir(tmp_path)
    for pattern in (".", "*.tar"):
        (shard,) = expand_shards(pattern)
        assert len(list(read_shard(shard))) == 1
    assert not (tmp_path / "run").exists()


def test_mixture_of_conditions_is_refused(tmp_path, tar, encode):
    tar(
        tmp_path / "a.tar",
        [("1.png", encode(picture(0))), ("1.cls", b"3"), ("2.png", encode(picture(1)))],
    )
    with pytest.raises(ValueError, match="a/2 has no label, but a/1 has one"):
        load(Shards(str(tmp_path / "a.tar")), tmp_path)


def test_repeated_keys_become_unique(tmp_path, make_shard):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        make_shard(tmp_path / folder, 0, 2)
    data = load(Shards(str(tmp_path / "{x,y}")), tmp_path, Framing(8, 8, 3))
    assert len(set(data.names)) == 4


# damage of any kind


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_any_damage_of_an_image_is_a_value_error(encode):
    generator = np.random.default_rng(0)
    whole = [encode(picture(0, 20, 20), kind) for kind in ("PNG", "JPEG", "WEBP")]
    whole.append(
        encode(picture(0, 20, 20), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + b"\x12\1" * 9)
    )
    refused = 0
    for number in range(400):
        data = bytearray(whole[number % 4])
        for _ in range(int(generator.integers(1, 6))):
            data[int(generator.integers(len(data)))] = int(generator.integers(256))
        try:
            image = open_image(bytes(data[: int(generator.integers(20, 2 * len(data)))]), "x")
            Framing(8, 8, 3).apply(image, "x", Framing(8, 8, 3))
        except ValueError as error:
            assert str(error).startswith("x: ")
            refused += 1
    assert 50 < refused < 400


def test_any_damage_of_an_archive_is_an_os_error(tmp_path, make_shard):
    generator = np.random.default_rng(0)
    whole = make_shard(tmp_path, 0, 3).read_bytes()
    whole = whole[: len(whole.rstrip(b"\0")) + 600]
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 :][:5] == b"ustar"]
    shard = tmp_path / "damaged.tar"
    for _ in range(300):
        data = bytearray(whole)
        at = headers[int(generator.integers(len(headers)))]
        for _ in range(int(generator.integers(1, 4))):
            data[at + int(generator.integers(512))] = int(generator.integers(256))
        data[at + 148 : at + 156] = b" " * 8  # a valid checksum, so that the fields are believed
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        shard.write_bytes(data)
        skipped = Skipped()
        list(read_shard(str(shard), skipped))
        assert all("damaged" in message for message in skipped.messages)
        if skipped:
            with pytest.raises((OSError, ValueError), match="damaged"):
                list(read_shard(str(shard)))


def test_huge_extended_header_is_not_read(tmp_path):
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 40
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(OSError, match="shard .*a.tar: .*extended header of 1099511627776 bytes"):
        list(read_shard(str(tmp_path / "a.tar")))


def test_chain_of_extended_headers(tmp_path):
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 0
    (tmp_path / "a.tar").write_bytes(info.tobuf() * 5000 + bytes(2048))
    with pytest.raises(OSError, match="shard .*a.tar: damaged archive"):
        list(read_shard(str(tmp_path / "a.tar")))


@pytest.mark.parametrize("mode", ["gz", "xz", "bz2"])
def test_compressed_archives(tmp_path, make_shard, mode):
    data = make_shard(tmp_path, 0, 3).read_bytes()
    packed = {"gz": gzip, "xz": lzma, "bz2": bz2}[mode].compress(data)
    shard = tmp_path / f"a.tar.{mode}"
    shard.write_bytes(packed)
    assert len(list(read_shard(str(shard)))) == 3
    shard.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(OSError, match=r"shard .*a.tar"):
        list(read_shard(str(shard)))
