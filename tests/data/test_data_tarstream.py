"""Tars of others: what is read, named, refused, and never run."""

import bz2
import gzip
import io
import lzma
import tarfile

import numpy as np
import pytest
from pictures import picture

from memfree.data.shard_reader import expand_shards, read_shard
from memfree.data.skipped import Skipped


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


def test_links_in_archives_are_not_followed(tmp_path, encode):
    with tarfile.open(tmp_path / "link.tar", "w") as archive:
        link = tarfile.TarInfo("1.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        image = encode(picture(0))
        info = tarfile.TarInfo("1.png")
        info.size = len(image)
        archive.addfile(info, io.BytesIO(image))
    with pytest.raises(ValueError, match="link/1: .txt is a link or device, not a file"):
        next(read_shard(str(tmp_path / "link.tar")))


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
    with pytest.raises(ValueError, match="is not a shard address"):
        expand_shards(address)


def test_a_file_whose_name_is_a_command_is_read_as_a_file(tmp_path, make_shard, monkeypatch):
    make_shard(tmp_path, 0, 1)
    (tmp_path / "00000.tar").rename(tmp_path / "pipe:touch run; cat 00000 #.tar")
    monkeypatch.chdir(tmp_path)
    for pattern in (".", "*.tar"):
        (shard,) = expand_shards(pattern)
        assert len(list(read_shard(shard))) == 1
    assert not (tmp_path / "run").exists()


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
