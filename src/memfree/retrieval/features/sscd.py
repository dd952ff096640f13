"""SSCD, the copy-detection embedding of the paper (Pizzi et al., 2022; AMG, eq. 9)."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from memfree.retrieval.features.base import NetworkFeatures
from memfree.retrieval.features.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from memfree.retrieval.options import Arithmetic, SSCDModel, SSCDPreprocessing

DIMENSIONS: dict[SSCDModel, int] = {
    **dict.fromkeys(get_args(SSCDModel), 512),
    "disc_large": 1024,
}
"""Length of each model's embedding (table of the SSCD repository)."""
_HALF = (0.5, 0.5, 0.5)
PREPROCESSINGS: dict[SSCDPreprocessing, Preprocessing] = {
    # The SSCD repository's small_288, recommended, and skew_320, for batches of mixed sizes.
    "authors_288": Preprocessing((288, 288), "shorter", None, IMAGENET_MEAN, IMAGENET_STD),
    "authors_320": Preprocessing((320, 320), "exact", None, IMAGENET_MEAN, IMAGENET_STD),
    # DCR's diff_retrieval.py, which Wen et al. follow, and its embedding_search.
    "dcr": Preprocessing((256, 256), "shorter", (224, 224), _HALF, _HALF),
    "dcr_search": Preprocessing((256, 256), "shorter", (224, 224), IMAGENET_MEAN, IMAGENET_STD),
    # AMG's evaluation: not normalised.
    "amg": Preprocessing((224, 224), "exact", None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
TRUSTED_SHA256: frozenset[str] = frozenset()
"""Files that need no ``trust_file``. Empty: the authors publish no checksums to copy."""
TRUST_VARIABLE = "MEMFREE_TRUSTED_SHA256"
"""Environment variable: further trusted SHA-256, separated by commas."""


class SSCDFeatures(NetworkFeatures):
    """SSCD embeddings of length 1, compared by cosine, from a published TorchScript file. The file
    is a program. It is loaded only if its SHA-256 is on the package's list or in the environment
    variable MEMFREE_TRUSTED_SHA256, or with ``trust_file``. ``model`` fixes the embedding's length;
    ``preprocessing`` is one of ``PREPROCESSINGS``."""

    def __init__(
        self,
        path: Path | str,
        model: SSCDModel = "disc_mixup",
        preprocessing: SSCDPreprocessing = "authors_288",
        dtype: Arithmetic = "float32",
        trust_file: bool = False,
    ) -> None:
        _check_known("model", model, DIMENSIONS)
        _check_known("preprocessing", preprocessing, PREPROCESSINGS)
        self.path = Path(path).absolute()
        if self.path.exists() and not self.path.is_file() and not self.path.is_dir():
            raise ValueError(f"{self.path} is not a plain file")  # a device never ends
        # Read once, so that what was hashed is what is loaded.
        content = self.path.read_bytes()
        self.weights_sha256 = hashlib.sha256(content).hexdigest()
        _check_trusted(self.path, self.weights_sha256, trust_file)
        network = _loaded(self.path, content)
        super().__init__(network, PREPROCESSINGS[preprocessing], dtype)
        self.model = model
        self.preset = preprocessing
        self._check_shape()

    def run(self, inputs: Tensor) -> Tensor:
        """The network's embedding (B, D), without TorchScript's profiling."""
        # Profiling recompiles for every shape and changes the arithmetic after the first calls.
        with torch.jit.optimized_execution(False):
            return self.network(inputs)

    def describe(self) -> dict[str, Any]:
        """Model, file, its hash, and the preprocessing by name and in full."""
        own = {"model": self.model, "path": str(self.path), "preset": self.preset}
        return self._describe("sscd", self.weights_sha256, **own)

    @torch.no_grad()
    def _check_shape(self) -> None:
        expected = (1, DIMENSIONS[self.model])
        try:
            output = self.run(torch.zeros(1, 3, 64, 64, dtype=self.dtype))
        except Exception as error:  # an unknown program raises anything
            reason = str(error).strip().splitlines()[-1:]
            raise ValueError(
                f"{self.path} does not map images to embeddings: {' '.join(reason)}"
            ) from error
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if shape != expected:
            raise ValueError(
                f"{self.path} gives {shape} for one image, but SSCD {self.model} gives {expected}"
            )


def _check_known(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ValueError(f"SSCD {name} {value!r} is not one of {', '.join(known)}")


def _check_trusted(path: Path, digest: str, trust_file: bool) -> None:
    named = os.environ.get(TRUST_VARIABLE, "").replace(" ", "").lower().split(",")
    if trust_file or digest in TRUSTED_SHA256 or digest in named:
        return
    raise ValueError(
        f"{path} is a program with SHA-256 {digest}, which is not on the list of known SSCD files: "
        "if you trust its origin, pass trust_file=True (--extractor.trust_file true), or set "
        f"{TRUST_VARIABLE}={digest} for every command that opens an index of it"
    )


def _loaded(path: Path, content: bytes) -> nn.Module:
    try:
        with warnings.catch_warnings():
            # torch's deprecation advice is for authors of such files, published in 2022.
            warnings.simplefilter("ignore", FutureWarning)
            return torch.jit.load(io.BytesIO(content), map_location="cpu")
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a TorchScript model") from error
