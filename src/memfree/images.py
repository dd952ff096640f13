"""Images: decoding of untrusted bytes, arrays and PNG."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from torch import Tensor

MAX_IMAGE_BYTES = 64 << 20  # of an encoded image
MAX_PIXELS = 64_000_000  # checked in the header before memory is allocated
FORMATS = ("PNG", "JPEG", "WEBP")  # the only decoders ever called
MAX_SCANS = 500  # of a JPEG: each covers all its pixels, however few bytes it has

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_CHANNELS = {"1": 1, "L": 1, "LA": 2, "P": 3, "RGB": 3, "CMYK": 3, "YCbCr": 3, "RGBA": 4}
_WITH_ALPHA = {"1": 2, "L": 2, "P": 4, "RGB": 4}  # if one colour of a PNG is transparent
_BITS = "bits of a PNG"  # key in Image.info: Pillow cuts 16 bits of colour to 8 without a word
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, KeyError)


def open_image(data: bytes, name: str) -> Image.Image:
    """Decode one PNG, JPEG or WEBP image; ValueError, starting with ``name``, if it is refused."""
    if len(data) > MAX_IMAGE_BYTES:
        raise ValueError(f"{name}: {len(data)} bytes are more than the limit {MAX_IMAGE_BYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: more pixels than the limit {MAX_PIXELS}") from error
    except _DECODER_ERRORS as error:
        raise ValueError(f"{name}: not a PNG, JPEG or WEBP image") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name}: more pixels than the limit {MAX_PIXELS} ({width} x {height})")
    # By its first bytes: Pillow calls a JPEG with several pictures in it MPO.
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_SCANS:
        raise ValueError(f"{name}: JPEG of more than {MAX_SCANS} scans")
    try:
        image.load()
    except _DECODER_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name}: damaged image ({reason})") from error
    if image.format == "PNG":
        image.info[_BITS] = data[24]
    return image


def further_frames(image: Image.Image) -> int:
    """Number of unused frames after the first, of animations and JPEGs with two pictures."""
    return int(getattr(image, "n_frames", 1)) - 1


def upright(image: Image.Image) -> Image.Image:
    """The image rotated by its EXIF orientation; damaged EXIF is ignored."""
    try:
        return ImageOps.exif_transpose(image)
    except _DECODER_ERRORS:
        return image


def channels_of(image: Image.Image, name: str) -> int:
    """8-bit channels that hold the image without loss; ValueError if 8 bits are too few."""
    if image.info.get(_BITS) == 16 and image.mode in _CHANNELS:
        raise ValueError(f"{name}: 16 bits a channel, not 8; convert it first")
    if "transparency" in image.info and image.mode in _WITH_ALPHA:
        return _WITH_ALPHA[image.mode]
    if image.mode not in _CHANNELS:
        raise ValueError(f"{name}: mode {image.mode} is not 8 bits a channel; convert it first")
    return _CHANNELS[image.mode]


def with_channels(image: Image.Image, channels: int) -> Image.Image:
    """Convert to 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA) channels; lost alpha is white."""
    mode = _MODES[channels]
    transparent = image.mode in ("LA", "RGBA") or "transparency" in image.info
    if image.mode == mode and "transparency" not in image.info:
        return image
    if transparent and channels in (1, 3):
        flat = Image.new("RGBA", image.size, (255, 255, 255, 255))
        flat.alpha_composite(image.convert("RGBA"))
        image = flat.convert("RGB")
    if mode == "LA" and image.mode != "RGBA":
        image = image.convert("RGBA")
    return image.convert(mode)


def to_array(image: Image.Image) -> np.ndarray:
    """Pixels (C, H, W) uint8 of an image in a mode of :func:`with_channels`."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def to_image(pixels: np.ndarray) -> Image.Image:
    """The inverse of :func:`to_array`."""
    if pixels.shape[0] == 1:
        return Image.fromarray(pixels[0])
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def pixels_to_png(pixels: np.ndarray) -> bytes:
    """PNG bytes of (C, H, W) uint8 pixels, always the same for the same pixels."""
    out = io.BytesIO()
    to_image(pixels).save(out, "PNG", compress_level=6, optimize=False)
    return out.getvalue()


def decode_record(data: bytes, name: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Pixels (C, H, W) uint8 of a record; ValueError if damaged or not of this ``shape``."""
    pixels = to_array(open_image(data, name))
    if pixels.shape != shape:
        raise ValueError(f"{name}: image has shape {pixels.shape}, the dataset says {shape}")
    return pixels


def to_bytes(images: Tensor) -> Tensor:
    """Quantise images (..., H, W) in [-1, 1], clamped, to uint8; halves go to the even byte."""
    import torch

    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """Images (..., H, W) float32 in [-1, 1] from uint8: x = u / 127.5 - 1."""
    import torch

    # In place: no second and third copy of large batches.
    return images.to(torch.float32, copy=True).div_(127.5).sub_(1)


def to_png(image: Tensor) -> bytes:
    """PNG of one uint8 image (C, H, W) with C = 1 or 3."""
    from torchvision.io import encode_png

    return encode_png(image.contiguous()).numpy().tobytes()


def png_size(data: bytes) -> tuple[int, int] | None:
    """(H, W) from a PNG's header without unpacking anything; None if it is not a PNG."""
    if len(data) < 24 or data[:8] != b"\x89PNG\r\n\x1a\n":
        return None
    width, height = struct.unpack(">II", data[16:24])  # of the chunk IHDR, which comes first
    return height, width


def from_png(data: bytes, channels: int) -> Tensor:
    """The uint8 image (C, H, W) in a PNG; ValueError if it is not a PNG."""
    import torch  # and not torchvision, whose decoder crashes on some damaged files

    image = with_channels(open_image(data, "sample"), channels)
    return torch.from_numpy(to_array(image).copy())
