"""Decoding within limits, and framing."""

import io
import struct
import zlib

import numpy as np
import pytest
from pictures import picture
from PIL import Image

from memfree import images
from memfree.data.ingest import Framing
from memfree.images import channels_of, open_image, pixels_to_png, to_array, with_channels


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_round_trip_is_exact_and_repeatable(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (channels, 5, 7)).astype(np.uint8)
    data = pixels_to_png(pixels)
    assert data == pixels_to_png(pixels.copy())
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
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 10)
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


def deep_png(colour, channels):
    """A PNG with 16 bits a channel."""

    def chunk(kind, data):
        ends = struct.pack(">I", len(data)), struct.pack(">I", zlib.crc32(kind + data))
        return ends[0] + kind + data + ends[1]

    header = struct.pack(">IIBBBBB", 4, 4, 16, colour, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(range(8 * channels))) * 4)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_of_any_colour_are_refused(colour, channels):
    image = open_image(deep_png(colour, channels), "deep")
    with pytest.raises(ValueError, match="deep: .*bits a channel"):
        channels_of(image, "deep")
    with pytest.raises(ValueError, match="deep: .*bits a channel"):
        Framing(4, 4, 3).apply(image, "deep", Framing(4, 4, 3))


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 4), ("L", 2), ("P", 4), ("1", 2)])
def test_a_transparent_colour_is_a_channel(mode, channels):
    out = io.BytesIO()
    clear = (255, 0, 0) if mode == "RGB" else 1 if mode == "P" else 0
    pixels = Image.new(mode, (2, 2), clear)
    if mode == "P":
        pixels.putpalette([0, 0, 0, 255, 0, 0])
    pixels.save(out, "PNG", transparency=clear)
    image = open_image(out.getvalue(), "x")
    assert channels_of(image, "x") == channels
    assert to_array(with_channels(image, channels))[-1].max() == 0
    for opaque in (1, 3):  # lost alpha goes white
        assert to_array(with_channels(image, opaque)).min() == 255


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
