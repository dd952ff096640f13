"""Embeddings of any timm network, with local, published or random weights."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import load_state_dict
from torch import Tensor

from memfree.retrieval.features.base import UNREADABLE, NetworkFeatures, last_line, state_hash
from memfree.retrieval.features.preprocessing import Preprocessing
from memfree.retrieval.options import Arithmetic


class TimmFeatures(NetworkFeatures):
    """A timm network's pooled features of length 1, compared by cosine, without its classifier.

    The preprocessing is the network's own, from timm's data configuration.

    Args:
        model: timm's name, as resnet18.a1_in1k.
        path: local weights: safetensors, or a state dict that is loaded with ``weights_only``; a
            classifier in it is left out.
        pretrained: instead, timm's published weights (downloaded).
        seed: seed of random weights, where neither is given: a baseline, and for tests.
        dtype: arithmetic of the network.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: timm knows no such model, or the weights are of another one.
    """

    def __init__(
        self,
        model: str,
        path: Path | str | None = None,
        pretrained: bool = False,
        seed: int = 0,
        dtype: Arithmetic = "float32",
    ) -> None:
        if path is not None and pretrained:
            raise ValueError("timm features take pretrained weights or a path, not both")
        self.model = model
        self.path = None if path is None else Path(path).absolute()
        self.pretrained = pretrained
        self.seed = seed
        if self.path is not None and not self.path.is_file():
            raise FileNotFoundError(f"no timm weights at {self.path}")
        network = self._make()
        if self.path is not None:
            self._fill(network, self.path)
        self.weights_sha256 = state_hash(network)
        config = resolve_model_data_config(network)
        super().__init__(network, Preprocessing.of_timm(config), dtype)

    def _make(self) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            try:
                return timm.create_model(self.model, pretrained=self.pretrained, num_classes=0)
            except UNREADABLE as error:
                near = difflib.get_close_matches(self.model, timm.list_models(), n=1)
                hint = f", did you mean {near[0]}?" if near else ""
                raise ValueError(
                    f"timm cannot make model {self.model!r}: {last_line(error)}{hint}"
                ) from error

    def _fill(self, network: Any, path: Path) -> None:
        try:
            state = load_state_dict(str(path), weights_only=True)
            found = network.load_state_dict(state, strict=False)
        except UNREADABLE as error:
            raise ValueError(
                f"{path} holds no weights of timm's {self.model}: {last_line(error)}"
            ) from error
        heads = network.pretrained_cfg.get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else tuple(heads)
        foreign = [
            name
            for name in found.unexpected_keys
            if not any(name.startswith(f"{head}.") for head in heads)
        ]
        if found.missing_keys or foreign:
            what = f"lacks {found.missing_keys[0]}" if found.missing_keys else f"has {foreign[0]}"
            raise ValueError(f"{path} holds no weights of timm's {self.model}: it {what}")

    def run(self, inputs: Tensor) -> Tensor:
        """Pooled features (B, D)."""
        return self.network(inputs)

    def describe(self) -> dict[str, Any]:
        """Model, where its weights are from, their hash and the preprocessing."""
        return self._describe(
            "timm",
            self.weights_sha256,
            model=self.model,
            path=None if self.path is None else str(self.path),
            pretrained=self.pretrained,
            seed=None if self.path is not None or self.pretrained else self.seed,
        )
