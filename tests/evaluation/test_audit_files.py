"""Audits: every file and frame is judged, or named; nothing in a name reaches the terminal."""

import gzip
import io
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from memfree.cli import entry
from memfree.commands.audit import audit, measure
from memfree.data.skipped import INCOMPLETE
from memfree.evaluation.audited_images import AuditedImages
from memfree.folders.manifest import read_manifest
from memfree.retrieval import ReferenceIndex

SHAPE = (1, 8, 8)


def picture(seed=0, kind="PNG", **options):
    """A picture of noise in some format."""
    out = io.BytesIO()
    noise(seed).save(out, kind, **options)
    return out.getvalue()


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8))


def animated(kind, count=3, **options):
    return picture(0, kind, save_all=True, append_images=[noise(i) for i in range(1, count)])


def tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def names_of(path):
    """Names of what is judged, and the source that says what is not."""
    source = AuditedImages(path, SHAPE)
    return [name for names, _ in source.batches(4) for name in names], source


JUDGED = {
    "a.png": picture(),
    "a.PNG": picture(),
    "a.jfif": picture(kind="JPEG"),
    "a.jpe": picture(kind="JPEG"),
    "a": picture(),
    "photo.of.a.cat": picture(kind="WEBP"),
    "a.txt": picture(),
    "wrong.gif": picture(),
    ".hidden.png": picture(),
    ".ipynb_checkpoints/a.png": picture(),
    "a.apng": picture(),
}


@pytest.mark.parametrize("name", JUDGED)
def test_a_picture_is_judged_whatever_it_is_called(tmp_path, name):
    file = tmp_path / "in" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(JUDGED[name])
    assert names_of(tmp_path / "in")[0] == [name]
    assert names_of(file)[0] == [file.name]


OTHER = {
    "a.gif": picture(kind="GIF"),
    "a.bmp": picture(kind="BMP"),
    "a.tif": picture(kind="TIFF"),
    "a.avif": picture(kind="AVIF"),
    "a.jp2": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40),
    "a.jxl": b"\xff\x0a" + bytes(40),
    "a.ico": picture(kind="ICO"),
    "a.heic": b"\0\0\0\x18ftypheic" + bytes(40),
    "a.svg": b"<svg></svg>",
    "a.psd": b"8BPS" + bytes(40),
    "a.zip": b"PK\3\4" + bytes(40),
    "a.cbz": b"PK\3\4" + bytes(40),
    "archive": b"PK\3\4" + bytes(40),
    "a.7z": b"7z\xbc\xaf\x27\x1c" + bytes(40),
    "a.gz": gzip.compress(picture()),
    "packed": gzip.compress(picture()),
    "packed.xz": b"\xfd7zXZ\0" + bytes(40),
    "a.tar.zst": b"\x28\xb5\x2f\xfd" + bytes(40),
    "a.dds": b"DDS " + bytes(40),
    "a.pdf": b"%PDF-1.4",
    "ppm": b"P6 8 8 255 " + bytes(192),
    "heics": b"\0\0\0\x18ftypmsf1" + bytes(40),
    "gif": picture(kind="GIF"),
    "tiff": picture(kind="TIFF"),
    "bmp.data": picture(kind="BMP"),
    "avif.bin": picture(kind="AVIF"),
    "renamed.png": picture(kind="GIF"),
    "broken.png": b"nothing",
    "cut.jpg": picture(kind="JPEG")[:100],
    "empty.webp": b"",
}


@pytest.mark.parametrize("name", OTHER)
def test_a_picture_that_cannot_be_judged_is_named(index, tmp_path, capsys, name):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_bytes(OTHER[name])
    (folder / "good.png").write_bytes(picture())
    names, source = names_of(folder)
    assert names == ["good.png"] and source.skipped.records == 1
    assert name in source.skipped.messages[0]
    tar(tmp_path / "a.tar", [("x/" + name, OTHER[name]), ("k.png", picture())])
    names, source = names_of(tmp_path / "a.tar")
    assert names == ["a/k"] and source.skipped.records == 1
    assert f"a/x/{name.split('.')[0]}" in source.skipped.messages[0]
    assert entry.main(["audit", str(folder), f"--index={index}"]) == INCOMPLETE
    assert name in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit) as exit_:
        entry.main(["audit", str(folder / name), f"--index={index}"])
    assert exit_.value.code == 2 and name in capsys.readouterr().err


def test_own_files_beside_an_audit_are_not_replaced(index, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(picture())
    audit(tmp_path / "in", index, tmp_path / "out")
    audit(tmp_path / "in", index, tmp_path / "out")
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match="--out .* notes.md"):
        audit(tmp_path / "in", index, tmp_path / "out")
    assert (tmp_path / "out" / "notes.md").read_text() == "mine"


def test_what_was_skipped_is_named_where_nothing_could_be_judged(index, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "only.png").write_bytes(b"nothing")
    with pytest.raises(SystemExit):
        entry.main(["audit", str(tmp_path / "in"), f"--index={index}"])
    said = capsys.readouterr().err
    assert "--images" in said and "only.png: not a PNG" in said


def test_frames_are_counted_where_they_are_judged(tmp_path):
    data = picture()
    place = data.index(b"IDAT") - 4
    count = b"acTL" + struct.pack(">II", 1 << 30, 0)  # which the file does not have
    chunk = struct.pack(">I", 8) + count + struct.pack(">I", zlib.crc32(count))
    (tmp_path / "a.png").write_bytes(data[:place] + chunk + data[place:])
    names, source = names_of(tmp_path)
    assert len(names) == source.frames == 1 and source.skipped.records


def test_other_files_are_counted_and_named(index, tmp_path):
    folder = tmp_path / "in"
    (folder / "empty").mkdir(parents=True)
    (folder / "a.png").write_bytes(picture())
    for name, data in {"x.npz": b"PK\3\4", "x.json.gz": gzip.compress(b"{}"), "P6": b"P6"}.items():
        (folder / name).write_bytes(data)
    for name in ("notes.md", "a.txt", "._a.png", "data.bin", "BM.txt"):
        (folder / name).write_bytes(b"BM, words" if name != "._a.png" else b"\0\5\x16\7" + bytes(9))
    assert audit(folder, index, tmp_path / "out") == 0
    manifest = read_manifest(tmp_path / "out", "audit")
    assert manifest["left_out"]["count"] == 9
    first = " ".join(manifest["left_out"]["first"])
    assert all(name in first for name in ("notes.md", "a.txt", "._a.png", "data.bin", "empty"))
    assert "left out: 9 (" in manifest["facts"]["Other files"]
    assert (manifest["skipped"]["records"], manifest["skipped"]["kept"]) == (0, 1)


def test_links_are_followed_and_circles_end(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.png").write_bytes(picture())
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "far")
    (folder / "back").symlink_to(folder)
    (folder / "b.png").symlink_to(tmp_path / "far" / "a.png")
    (folder / "gone.png").symlink_to("nowhere.png")
    names, source = names_of(folder)
    assert names == ["b.png", "linked/a.png"]
    assert "gone.png" in source.skipped.messages[0]
    assert any("back" in what for what in source.left_out.first)


def test_tars_beside_pictures(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "deep").mkdir()
    tar(tmp_path / "b.tar", [("k.png", picture(2))])
    tar(tmp_path / "deep" / "c.tgz", [("k.png", picture(3))], "w:gz")
    tar(tmp_path / "no_ending", [("k.png", picture(4))])
    names, source = names_of(tmp_path)
    assert sorted(names) == ["a.png", "b/k", "c/k", "no_ending/k"] and not source.skipped


def test_every_picture_of_a_tar_is_judged(tmp_path):
    members = ["k.png", "k.v2.png", "k.jpg", "k.seg.png", "n.a.m.e.webp", "alone", "k.png"]
    data = {"jpg": picture(kind="JPEG"), "webp": picture(kind="WEBP")}
    tar(
        tmp_path / "a.tar",
        [(name, data.get(name.split(".")[-1], picture())) for name in members]
        + [("k.txt", b"words"), ("k.json", b"{}"), ("x.bin", b"other")],
    )
    names, source = names_of(tmp_path / "a.tar")
    assert len(names) == len(members) and not source.skipped
    assert {"a/k", "a/k.jpg", "a/k.v2", "a/k.seg", "a/n.a.m.e", "a/alone"} <= set(names)
    assert source.left_out.count == 3


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "MPO"])
def test_every_frame_is_judged(index, tmp_path, kind):
    """The copy is in the last frame alone."""
    references = ReferenceIndex.load(index)
    copy = Image.fromarray(
        ((references.vectors[0].reshape(8, 8).numpy() + 1) * 127.5).round().astype(np.uint8)
    ).convert("RGB")
    path = tmp_path / f"a.{kind.lower() if kind != 'MPO' else 'jpg'}"
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "MPO" else {}
    noise(1).save(path, kind, save_all=True, append_images=[noise(2), copy], **options)
    result = measure(references, path, 0.05)
    rows = {row["image"]: row["copy"] for row in result.table.to_pylist()}
    name = path.name
    assert rows == {
        f"{name} (frame 1 of 3)": False,
        f"{name} (frame 2 of 3)": False,
        f"{name} (frame 3 of 3)": True,
    }
    assert "3 images are frames" in result.facts["Frames"]


def test_frames_beyond_the_limit_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("memfree.evaluation.audited_images.MAX_FRAMES", 2)
    (tmp_path / "a.webp").write_bytes(animated("WEBP", 5))
    names, source = names_of(tmp_path)
    assert len(names) == 2 and "only 2 of its 5 frames" in source.skipped.messages[0]


def test_a_damaged_later_frame_is_named(tmp_path):
    data = bytearray(animated("PNG"))
    data[data.rindex(b"fdAT") + 12] ^= 255
    (tmp_path / "a.png").write_bytes(data)
    names, source = names_of(tmp_path)
    assert len(names) + source.skipped.records == 3 and source.skipped.records >= 1
    assert "a.png (frame" in source.skipped.messages[0]


NAMES = {
    "escape": (b"\x1b[2J\x1b]0;x\x07.png", r"\x1b[2J\x1b]0;x\x07.png"),
    "line": (b"a\nb.png", r"a\nb.png"),
    "return": (b"good.png\rbad.png", r"good.png\rbad.png"),
    "not UTF-8": (b"\xff\xfe.png", r"\xff\xfe.png"),
    "turned": ("\u202egnp.a.png".encode(), r"\u202egnp.a.png"),
    "C1": ("\x9b2J.png".encode(), r"\x9b2J.png"),
    "separator": ("a\u2028b.png".encode(), r"a\u2028b.png"),
    "spaces": ("a\u202fb\u00a0c.png".encode(), "a\u202fb\u00a0c.png"),
    "joined": ("\U0001f468\u200d\U0001f33e.png".encode(), "\U0001f468\u200d\U0001f33e.png"),
    "markup": (b"[red]:cat:.png", "[red]:cat:.png"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_judged_and_shown_as_text(index, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "160")
    raw, expected = NAMES[name]
    folder = tmp_path / "in"
    folder.mkdir()
    for given in (raw, b"broken" + raw):
        with open(os.path.join(os.fsencode(folder), given), "wb") as file:
            file.write(picture() if given == raw else b"nothing")
    assert entry.main(["audit", str(folder), f"--index={index}", f"--out={tmp_path}/out"]) == 3
    printed = capsys.readouterr().out
    assert expected in printed and "broken" + expected in printed
    assert set(printed) & set("\x1b\r\x9b\u202e\u2028\x07") == set()
    table = parquet.read_table(tmp_path / "out" / "audit.parquet")
    assert table["image"].to_pylist() == [expected]
    assert "\x1b" not in (tmp_path / "out" / "index.html").read_text()
    read_manifest(tmp_path / "out", "audit")


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_terminals_of_other_encodings(index, tmp_path, encoding):
    (tmp_path / "\u0444\u03c3.png").write_bytes(picture())
    code = "from memfree.cli.entry import main; import sys; sys.exit(main())"
    command = [sys.executable, "-c", code, "audit", str(tmp_path), f"--index={index}"]
    done = subprocess.run(
        [*command, f"--out={tmp_path}/out"],
        env={**os.environ, "PYTHONIOENCODING": f"{encoding}:strict", "COLUMNS": "120"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert rb"\u0444" in done.stdout
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_an_audit_is_written_before_it_is_printed(index, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(picture())

    def fail(*_):
        raise UnicodeEncodeError("ascii", "x", 0, 1, "cannot be shown")

    monkeypatch.setattr(sys.modules[audit.__module__], "_print", fail)
    with pytest.raises(UnicodeEncodeError):
        audit(tmp_path / "a.png", index, tmp_path / "out")
    assert read_manifest(tmp_path / "out", "audit")
    shutil.rmtree(tmp_path / "out")
