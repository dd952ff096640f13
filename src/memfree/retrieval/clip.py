"""Embeddings of a CLIP image tower, by open_clip's name and weights or a local checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from memfree.retrieval.clip_folder import load_clip
from memfree.retrieval.network import NetworkFeatures, state_hash
from memfree.retrieval.options import Arithmetic
from memfree.retrieval.preprocessing import Preprocessing
from memfree.retrieval.weights_file import UNREADABLE, last_line
from memfree.untrusted import check_plain_folder


class CLIPFeatures(NetworkFeatures):
    """CLIP image embeddings of length 1, compared by cosine; the text tower is not kept.

    The preprocessing is the one that open_clip states for model and weights.

    Args:
        model: open_clip's name of the architecture, as ViT-B-32; None where ``path`` is a folder.
        pretrained: open_clip's name of published weights, as laion2b_s34b_b79k (downloaded).
        path: instead, a local checkpoint (safetensors, or a state dict that is loaded with
            ``weights_only``), or a folder with open_clip_config.json and a checkpoint.
        dtype: arithmetic of the network.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the options contradict each other, name nothing that exists, or the weights are
            of another model.
    """

    def __init__(
        self,
        model: str | None = "ViT-B-32",
        pretrained: str | None = None,
        path: Path | str | None = None,
        dtype: Arithmetic = "float32",
    ) -> None:
        if (pretrained is None) == (path is None):
            raise ValueError("CLIP features need either pretrained weights' name or a path")
        self.path = None if path is None else Path(path).absolute()
        if self.path is not None and not self.path.exists():
            raise FileNotFoundError(f"no CLIP checkpoint at {self.path}")
        if self.path is not None and not (self.path.is_file() or self.path.is_dir()):
            raise ValueError(f"{self.path} is no plain file")  # a device would have no end
        if self.path is not None and self.path.is_dir():
            check_plain_folder(self.path)
        self.model = None if self.path is not None and self.path.is_dir() else model
        self.pretrained = pretrained
        tower, config = self._load()
        self.weights_sha256 = state_hash(tower)
        super().__init__(tower, Preprocessing.of_open_clip(config), dtype)

    def _load(self) -> tuple[Any, dict[str, Any]]:
        import open_clip  # takes seconds, which nobody else should wait for

        if self.model is None:
            if self.path is None:
                raise ValueError("CLIP features need a model, as ViT-B-32")
            clip = load_clip(self.path)
        else:
            if self.model.startswith("local-dir:"):
                raise ValueError(f"CLIP model {self.model}: give a folder as --extractor.path")
            if ":" not in self.model and open_clip.get_model_config(self.model) is None:
                raise ValueError(
                    f"open_clip knows no model {self.model!r}; see open_clip.list_models()"
                )
            tags = open_clip.list_pretrained_tags_by_model(self.model.replace("/", "-"))
            if self.pretrained is not None and self.pretrained not in tags:
                known = ", ".join(tags) or "none"
                raise ValueError(
                    f"open_clip has no weights {self.pretrained!r} of {self.model}; it has {known}"
                )
            clip = self._create(self.model, self.pretrained or str(self.path))
        return clip.visual, open_clip.get_model_preprocess_cfg(clip)

    def _create(self, name: str, weights: str) -> Any:
        import open_clip

        try:
            return open_clip.create_model(name, weights, require_pretrained=True)
        except (*UNREADABLE, OSError) as error:
            what = self.pretrained if self.path is None else self.path
            raise ValueError(
                f"CLIP {self.model} cannot be made of {what}: {last_line(error)}"
            ) from error

    def run(self, inputs: Tensor) -> Tensor:
        """The image tower's projected embedding (B, D)."""
        output = self.network(inputs)
        # Some towers (CoCa's) return their tokens as well.
        return output[0] if isinstance(output, tuple) else output

    def describe(self) -> dict[str, Any]:
        """Model, weights, their hash (of the image tower) and the preprocessing."""
        return self._describe(
            "clip",
            self.weights_sha256,
            model=self.model,
            pretrained=self.pretrained,
            path=None if self.path is None else str(self.path),
        )
