"""Float32 matrix products in full precision, whatever torch's global setting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch


class _Setting:
    """Process-wide: the first thread sets ``ieee``, the last restores; others get it meanwhile."""

    def __init__(self, matmul: Any) -> None:
        self._matmul = matmul
        self._lock = Lock()
        self._holders = 0
        self._before = "ieee"

    def __enter__(self) -> None:
        with self._lock:
            if self._holders == 0:
                self._before = self._matmul.fp32_precision
            if self._matmul.fp32_precision != "ieee":
                self._matmul.fp32_precision = "ieee"
            self._holders += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._holders -= 1
            # Whoever set another precision meanwhile keeps it.
            if self._holders == 0 and self._matmul.fp32_precision == "ieee":
                self._matmul.fp32_precision = self._before


_BACKENDS: Any = torch.backends
_CUDA, _MKLDNN = _Setting(_BACKENDS.cuda.matmul), _Setting(_BACKENDS.mkldnn.matmul)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute float32 products on ``device`` in IEEE float32, whatever torch and autocast allow."""
    with _CUDA if device.type == "cuda" else _MKLDNN, torch.autocast(device.type, enabled=False):
        yield
