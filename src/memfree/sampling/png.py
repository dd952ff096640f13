"""Samples as PNG bytes and back: x in [-1, 1] is stored as round(127.5·(x + 1))."""

from __future__ import annotations

import struct

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_png, encode_png


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
    """The uint8 image (C, H, W) in a PNG; RuntimeError if it is none."""
    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    return decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode)
