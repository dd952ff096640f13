"""Samples as PNG bytes and back: x in [-1, 1] is stored as round(127.5·(x + 1))."""

from __future__ import annotations

import struct

import torch
from torch import Tensor
from torchvision.io import encode_png

from memfree.data.decode import open_image, to_array, with_channels


def to_bytes(images: Tensor) -> Tensor:
    """Quantise images (..., H, W) in [-1, 1], clamped, to uint8; the error is at most 1/255."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """Images (..., H, W) float32 in [-1, 1] from uint8."""
    return images.to(torch.float32) / 127.5 - 1


def encode(image: Tensor) -> bytes:
    """PNG of one uint8 image (C, H, W) with C = 1 or 3."""
    return encode_png(image.contiguous()).numpy().tobytes()


def size(data: bytes) -> tuple[int, int] | None:
    """(H, W) that a PNG's header says, before anything is unpacked; None if it is no PNG."""
    if len(data) < 24 or data[:8] != b"\x89PNG\r\n\x1a\n":
        return None
    width, height = struct.unpack(">II", data[16:24])  # of the chunk IHDR, which comes first
    return height, width


def decode(data: bytes, channels: int) -> Tensor:
    """The uint8 image (C, H, W) in a PNG; ValueError if it is none.

    By Pillow: torchvision's decoder crashes the process on some damaged files.
    """
    image = with_channels(open_image(data, "sample"), channels)
    return torch.from_numpy(to_array(image).copy())
