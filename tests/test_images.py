"""Images in [-1, 1] and their bytes: one conversion, the same bits everywhere."""

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from memfree.images import from_bytes, to_bytes
from memfree.pipeline_guard.call import as_tensor

SOURCE = Path(__file__).parents[1] / "src" / "memfree"
EVERY_BYTE = torch.arange(256, dtype=torch.uint8)


def test_every_byte_comes_back():
    assert torch.equal(to_bytes(from_bytes(EVERY_BYTE)), EVERY_BYTE)
    expected = (EVERY_BYTE.numpy().astype(np.float32) / np.float32(127.5)) - np.float32(1)
    assert np.array_equal(from_bytes(EVERY_BYTE).numpy(), expected)
    assert EVERY_BYTE.tolist() == list(range(256))  # not changed in place


def test_what_lies_outside_becomes_black_or_white():
    beyond = torch.tensor([-1e30, -1.0001, -1.0, 1.0, 1.0001, float("inf")])
    assert to_bytes(beyond).tolist() == [0, 0, 0, 255, 255, 255]


def test_an_image_of_pillow_has_the_bits_of_its_bytes():
    pixels = EVERY_BYTE.view(16, 16, 1).expand(-1, -1, 3)
    made = as_tensor([Image.fromarray(pixels.numpy())], "pil", lambda x: x, torch.device("cpu"))
    assert torch.equal(made, from_bytes(pixels.permute(2, 0, 1))[None])


def test_nobody_converts_by_hand():
    by_hand = re.compile(r"127\.5\)|\* 127\.5|/ 127\.5|to\(torch\.uint8\)|\.byte\(\)|to_float\(")
    known = {"images.py", "retrieval/search.py"}
    found = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if any(by_hand.search(line) for line in path.read_text().splitlines())
    }
    assert found == known  # the second sorts a mask
