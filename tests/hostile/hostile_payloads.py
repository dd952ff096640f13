"""Hostile bytes: pickles that would run, JSON that would not fit, images that would not end."""

import io
import pickle
import struct
import zlib

import numpy as np
from PIL import Image

DEEP_JSON = b"[" * 200_000
WRONG_JSON = {
    "a number": b"7",
    "null": b"null",
    "text": b'"words"',
    "a list": b"[1, 2]",
    "deep": DEEP_JSON,
    "deep objects": b'{"a":' * 200_000,
    "a number of 100 000 digits": b'{"a": ' + b"9" * 100_000 + b"}",
    "not text": bytes(range(256)),
    "empty": b"",
    "cut": b'{"a": [1, ',
    "zero bytes": bytes(2000),
    "not a number": b'{"a": NaN}',
    "infinity": b'{"a": 1e999}',
}
"""What a JSON file may hold instead of the object that it should."""
OTHER_VALUES = [None, True, -1, 0, 1 << 70, 1.5, 1e300, "", "a\nb", "\x1b[2J", "../x", [], [[]], {}]
"""What a JSON value may be instead of what it should."""


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def pickled(path):
    """A pickle that makes the file ``path``."""
    return pickle.dumps({"state_dict": Canary(path)})


def object_array(path):
    """An .npy file with such a pickle in it."""
    out = io.BytesIO()
    np.save(out, np.array([Canary(path)], dtype=object), allow_pickle=True)
    return out.getvalue()


def chunk(kind, data):
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width=4, height=4, extra=b"", data=None, depth=8, colour=0):
    """A grey PNG with its header as told and ``extra`` chunks before its data."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    rows = zlib.compress(bytes((width + 1) * height)) if data is None else data
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


def zeros(size):
    """``size`` zero bytes, packed, without holding them."""
    packer = zlib.compressobj(9)
    parts = [packer.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join([*parts, packer.flush()])


def jpeg(scans=1, size=16):
    """A progressive JPEG whose last scan is repeated."""
    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def mpo(scans):
    """The same under the header of a file with two pictures, as stereo cameras write it."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(
        out, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]
    )
    two = out.getvalue()
    at = two.index(b"\xff\xe2")
    length = 2 + int.from_bytes(two[at + 2 : at + 4], "big")
    data = jpeg(scans)
    return data[:2] + two[at : at + length] + data[2:]


def saved(kind, size=(8, 8), **options):
    """An ordinary image in some format."""
    out = io.BytesIO()
    Image.new("RGB", size).save(out, kind, **options)
    return out.getvalue()


def bad_images():
    """Images that must be refused, by name."""
    whole, photo = png(), saved("JPEG", (64, 64))
    crc = bytearray(whole)
    crc[30] ^= 255  # in the CRC of IHDR
    return {
        "60000 x 60000 PNG": png(60_000, 60_000, data=zeros(1 << 20)),
        "more pixels than any PNG may have": png(2**31 - 1, 2**31 - 1, data=b""),
        "PNG of no width": png(0, 4, data=b""),
        "PNG text of 256 MiB": png(extra=chunk(b"zTXt", b"a\0\0" + zeros(256 << 20))),
        "PNG international text of 256 MiB": png(
            extra=chunk(b"iTXt", b"a\0\1\0\0\0" + zeros(256 << 20))
        ),
        "PNG of 2000 large texts": png(extra=chunk(b"zTXt", b"a\0\0" + zeros(1 << 20)) * 2000),
        "PNG profile of 256 MiB": png(extra=chunk(b"iCCP", b"a\0\0" + zeros(256 << 20))),
        "PNG with a wrong checksum": bytes(crc),
        "PNG that is cut": whole[:45],
        "PNG without data": whole[:33] + chunk(b"IEND", b""),
        "PNG whose data are no deflate": png(data=b"\xff" * 40),
        "PNG of a chunk of 2 GiB": whole[:33]
        + struct.pack(">I", 2**31 - 1)
        + b"IDAT"
        + whole[41:44],
        "PNG with an unknown depth": png(depth=7),
        "PNG of 16 bits": png(depth=16, data=zlib.compress(bytes(9 * 4))),
        "JPEG that is cut": photo[: len(photo) // 2],
        "JPEG of 65500 x 65500": _jpeg_of(photo, 65_500),
        "JPEG of 5000 scans": jpeg(5000),
        "MPO of 5000 scans": mpo(5000),
        "BMP": saved("BMP"),
        "GIF": saved("GIF"),
        "TIFF": saved("TIFF"),
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(canary) (w) file\n",
        "text": b"hello",
        "nothing": b"",
        "WEBP of a header alone": saved("WEBP")[:24],
        "pickle": pickled("canary"),
    }


def _jpeg_of(data, size):
    """A JPEG that says that it is larger."""
    at = data.index(b"\xff\xc0")
    return data[: at + 5] + struct.pack(">HH", size, size) + data[at + 9 :]
