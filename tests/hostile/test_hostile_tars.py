"""Tars with names, types and sizes that no tar of images has."""

import gzip
import io
import json
import lzma
import os
import tarfile
from functools import partial

import pytest
from hostile_guard import bounded, refused, tree
from hostile_payloads import DEEP_JSON, WRONG_JSON, bad_images, pickled, png

from memfree.cli import entry
from memfree.commands.prepare import prepare
from memfree.data.shard_reader import read_shard
from memfree.data.skipped import Skipped
from memfree.evaluation.audited_images import AuditedImages


def add(archive, name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    archive.addfile(info, io.BytesIO(content))


def record(name="1", **members):
    """A function that writes one record of these members."""

    def write(archive):
        for suffix, content in {"png": png(), **members}.items():
            add(archive, f"{name}.{suffix}", content)

    return write


def special(kind, target=""):
    return lambda archive: add(archive, "1.png", type=kind, linkname=target)


def sparse(size):
    """A member of zeros alone that says that it is ``size`` bytes long (GNU's old format)."""

    def write(archive):
        info = tarfile.TarInfo("1.png")
        info.type = tarfile.GNUTYPE_SPARSE
        block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        block[386:398] = tarfile.itn(0, 12, tarfile.GNU_FORMAT)
        block[398:410] = tarfile.itn(0, 12, tarfile.GNU_FORMAT)
        block[483:495] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        archive.fileobj.write(bytes(block))
        archive.offset += 512

    return write


def huge(size):
    """A member that is said to be larger than the archive."""

    def write(archive):
        info = tarfile.TarInfo("1.bin")
        info.size = size
        archive.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
        archive.offset += 512

    return write


def pax(**headers):
    """A record with such an extended header."""

    def write(archive):
        archive.addfile(info := tarfile.TarInfo("1.png"))
        info.pax_headers = headers
        archive.addfile(info)

    return write


def meta(**fields):
    return record(json=json.dumps(fields).encode())


RECORDS = {
    "absolute name": record("/etc/1"),
    "name that climbs": record("../../../1"),
    "name that climbs in the middle": record("a/../../1"),
    "name with a new line": record("a\nmemfree: error: b"),
    "name with a terminal's commands": record("\x1b[2J1"),
    "name that is not text": record("\udcff1"),
    "symbolic link": special(tarfile.SYMTYPE, "/etc/passwd"),
    "symbolic link to itself": special(tarfile.SYMTYPE, "1.png"),
    "hard link": special(tarfile.LNKTYPE, "/etc/passwd"),
    "character device": special(tarfile.CHRTYPE),
    "block device": special(tarfile.BLKTYPE),
    "fifo": special(tarfile.FIFOTYPE),
    "unknown type": special(b"Z"),
    "class of 1 MB of digits": record(cls=b"9" * 1_000_000),
    "class that is infinite": record(json=b'{"label": 1e999}'),
    "class that is no number": meta(label="nan"),
    "class of thousands of digits": record(json=b'{"label": %s}' % (b"9" * 4000)),
    "class that is true": meta(label=True),
    "class that is half a number": meta(label=1.5),
    "class that is a list": meta(label=[1]),
    "class below zero": meta(label=-1),
    "caption that is a list": meta(caption=["a"]),
    "caption that is an object": meta(caption={"a": "b"}),
    "caption that cannot be written": record(json=b'{"caption": "\\ud800"}'),
    "key that cannot be written": record(json=b'{"image_key": "\\ud800"}'),
    "group with a terminal's commands": meta(group="\x1b[2J"),
    **{
        f"JSON: {name}": record(json=text)
        for name, text in WRONG_JSON.items()
        if name not in ("a number of 100 000 digits", "not a number", "infinity")
    },
    "JSON: a huge number": record(json=b'{"label": ' + b"9" * 100_000 + b"}"),
}
ARCHIVES = {
    "sparse file of 1 TiB": sparse(1 << 40),
    "member of 8 EiB": huge((1 << 63) - 1),
    "member of less than nothing": pax(size="-9"),
    "sparse map of a billion parts": pax(
        **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9" * 30}
    ),
    "sparse map of wrong numbers": pax(**{"GNU.sparse.map": "1,2,x", "GNU.sparse.size": "1"}),
}


def written(path, write, mode="w"):
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as archive:
        write(archive)
    return path


@pytest.mark.parametrize("name", RECORDS)
def test_bad_records_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shard = written(tmp_path / "bad.tar", RECORDS[name])
    before = tree(tmp_path)
    refused(lambda: list(read_shard(str(shard))), "bad")
    skipped = Skipped()
    with bounded():
        assert list(read_shard(str(shard), skipped)) == []
    assert (skipped.records, skipped.shards) == (1, set())
    out = ["--source=shards", f"--path={shard}", f"--out={tmp_path / 'out'}"]
    with bounded(), pytest.raises(SystemExit, match="2"):
        entry.main(["prepare", *out])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ARCHIVES)
def test_bad_archives_are_refused(tmp_path, name):
    shard = written(tmp_path / "bad.tar", ARCHIVES[name])
    refused(lambda: list(read_shard(str(shard))), shard)
    skipped = Skipped()
    with bounded():
        list(read_shard(str(shard), skipped))
    assert skipped.shards == {str(shard)}


def bomb(path, size, opened):
    """Few bytes that unpack to one member of ``size`` zeros."""
    info = tarfile.TarInfo("1.bin")
    info.size = size
    with opened(path, "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
        file.write(bytes(1024))


@pytest.mark.parametrize("kind", ["gz", "xz", "many members", "image"])
def test_archives_that_unpack_to_far_more_than_they_are(tmp_path, kind):
    shard = tmp_path / "bomb.tar.gz"
    if kind == "xz":
        bomb(shard, 100 << 20, partial(lzma.open, preset=0))
    elif kind == "gz":
        bomb(shard, 100 << 20, partial(gzip.open, compresslevel=6))
    else:
        one = io.BytesIO()
        with tarfile.open(fileobj=one, mode="w") as archive:
            add(archive, "1.png" if kind == "image" else "1.bin", bytes(40 << 20))
        part = one.getvalue()[: (40 << 20) + 512]
        with gzip.open(shard, "wb", 6) as file:
            for _ in range(3):
                file.write(part)
    refused(lambda: list(read_shard(str(shard))), shard, "unpacks to more than")


@pytest.mark.parametrize("name", bad_images())
def test_bad_images_in_tars_write_nothing_else(tmp_path, monkeypatch, name):
    if name == "PNG of 16 bits":
        pytest.skip("has a message of its own")
    monkeypatch.chdir(tmp_path)
    shard = written(tmp_path / "bad.tar", record(png=bad_images()[name]))
    before = tree(tmp_path)
    refused(lambda: prepare(tmp_path / "out", source="shards", path=str(shard)), "bad/1")
    images = AuditedImages(shard, (1, 4, 4))
    with bounded():
        assert list(images.batches(4)) == [] and images.skipped.records == 1
    assert tree(tmp_path) == before


@pytest.mark.parametrize("content", [pickled("canary"), DEEP_JSON, bytes(5000), b""])
def test_what_is_no_tar(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.tar").write_bytes(content)
    with bounded():
        try:
            assert list(read_shard("a.tar")) == []
        except OSError as error:
            assert "a.tar" in str(error)
    assert os.listdir(tmp_path) == ["a.tar"]
