"""Images that bomb, lie or are broken, by every way on which images come in."""

import io
import os

import hostile_payloads
import pytest
import torch
from hostile_guard import bounded, refused, tree
from hostile_payloads import bad_images, chunk, png, saved

from memfree.commands.prepare import prepare
from memfree.data.skipped import Skipped
from memfree.data.sources import ImageFolder
from memfree.evaluation.audited_images import AuditedImages
from memfree.images import open_image, upright

BAD = bad_images()


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_refused(name):
    def read():
        image = open_image(BAD[name], "photo 7")
        if image.mode.startswith("I"):
            from memfree.images import channels_of

            channels_of(image, "photo 7")

    refused(read, "photo 7")


def orientation(value, kind=3):
    """EXIF with one entry, the orientation."""
    entry = b"\x12\x01" + bytes([kind, 0]) + b"\x01\0\0\0" + value
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + bytes(4)


@pytest.mark.parametrize(
    "exif",
    [
        orientation(b"\xff\xff\0\0"),
        orientation(b"\x06\0\0\0", kind=2),
        orientation(b"\xff\xff\xff\xff", kind=5),
        orientation(b"\x06\0\0\0", kind=7),
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0" + bytes.fromhex("92f1ecd1b4b6389cf5"),
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(100),
    ],
)
def test_broken_exif_turns_nothing(exif):
    image = open_image(saved("JPEG", (8, 4), exif=exif), "photo 7")
    assert upright(image).size in {(8, 4), (4, 8)}


def test_broken_xmp_turns_nothing():
    text = b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation='9' tiff:Orientation=\xff>"
    assert upright(open_image(png(extra=chunk(b"iTXt", text)), "photo 7")).size == (4, 4)


def test_a_folder_of_bad_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, data in enumerate(BAD.values()):
        (photos / f"{number}.png").write_bytes(data)
    os.mkfifo(photos / "pipe.png")
    (photos / "nowhere.png").symlink_to("/nowhere/at/all.png")
    (photos / "zero.png").symlink_to("/dev/zero")
    (photos / "circle.png").symlink_to("circle.png")
    with open(photos / "sparse.png", "wb") as file:
        file.truncate(1 << 40)
    before = tree(tmp_path)
    images = AuditedImages(photos, (1, 4, 4))
    with bounded():
        assert list(images.batches(4)) == [] or images.skipped.records >= len(BAD) - 2
    skipped = Skipped()
    with bounded():
        assert len(list(ImageFolder(photos).images(skipped))) == len(BAD)
    named = ("circle.png", "nowhere.png", "pipe.png", "sparse.png", "zero.png")
    assert skipped.records == len(named)
    assert all(any(name in what for what in skipped.messages) for name in named)
    assert tree(tmp_path) == before
    (photos / "sparse.png").unlink()  # for which no disk would have room
    refused(lambda: prepare(tmp_path / "out", source="folder", path=str(photos)), "0.png")
    assert not (tmp_path / "out").exists() and len(tree(tmp_path)) == len(before) - 1


@pytest.mark.parametrize("name", ["long", "device", "circle"])
def test_captions_beside_images(tmp_path, name):
    (tmp_path / "0.png").write_bytes(png())
    caption = tmp_path / "0.txt"
    if name == "long":
        with open(caption, "wb") as file:
            file.truncate(1 << 40)
    else:
        (tmp_path / "1.png").write_bytes(png())
        (tmp_path / "1.txt").write_text("words")
        caption.symlink_to("/dev/zero" if name == "device" else "0.txt")
    refused(lambda: list(ImageFolder(tmp_path).images(None)), tmp_path, "0.")


@pytest.mark.parametrize("name", [b"\xff.png", b"a\nb.png", b"\x1b[2J.png"])
def test_names_that_no_terminal_should_see(tmp_path, name):
    with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
        file.write(png())
    refused(lambda: list(ImageFolder(tmp_path).images(None)), tmp_path)


def test_samples_are_not_decoded_beyond_their_shape():
    from memfree.images import from_png

    with bounded(), pytest.raises(ValueError):
        from_png(hostile_payloads.png(60_000, 60_000, data=hostile_payloads.zeros(1 << 20)), 1)
    assert torch.equal(from_png(png(), 1), torch.zeros(1, 4, 4, dtype=torch.uint8))
    assert io.BytesIO(png()).getbuffer().nbytes < 100
