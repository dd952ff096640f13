"""CLIP features, from open_clip or an untrusted local CLIP folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memfree.folders.untrusted import check_plain_folder, short
from memfree.retrieval.features.base import NetworkFeatures, state_hash, unreadable
from memfree.retrieval.features.preprocessing import Preprocessing
from memfree.retrieval.options import Arithmetic

CONFIG = "open_clip_config.json"
_MODEL = (
    "embed_dim",
    "vision_cfg",
    "text_cfg",
    "multimodal_cfg",
    "custom_text",
    "quick_gelu",
    "init_logit_scale",
    "init_logit_bias",
    "nonscalar_logit_scale",
    "output_dict",
    "pad_id",
)
_PREPROCESSING = ("size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color")
_TOKENIZER = ("clean", "strip_sep_token", "reduction_mask", "additional_special_tokens")
_NAMES_A_HUB = ("hf_model_name",)
"""Option that makes open_clip fetch a text tower's configuration from the hub."""


def load_clip(folder: Path) -> Any:
    """Build an open_clip folder's CLIP on the CPU; ValueError if it names code or a hub."""
    import open_clip  # slow: takes seconds

    name = f"local-dir:{folder.absolute()}"
    _read_config(folder)
    with unreadable(f"{folder} holds no CLIP", OSError):
        _check_size(open_clip, name, folder)
        return open_clip.create_model(name, require_pretrained=True)


def load_tokenizer(folder: Path) -> Any:
    """Load such a folder's tokenizer: open_clip's own, or one with files in the folder."""
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer

    from memfree.folders.untrusted_models import check_tokenizer

    text = _read_config(folder)["text_cfg"]
    options = {
        "context_length": text.get("context_length", DEFAULT_CONTEXT_LENGTH),
        **(text.get("tokenizer_kwargs") or {}),
    }
    with unreadable(f"{folder} holds no tokenizer", OSError):
        if not text.get("hf_tokenizer_name"):
            return SimpleTokenizer(**options)
        check_tokenizer(folder, must_be_named=True)
        return HFTokenizer(
            str(folder.absolute()),
            tokenizer_mode=text.get("tokenizer_mode"),
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )


def _read_config(folder: Path) -> dict[str, Any]:
    import timm
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    from memfree.folders.untrusted_models import read_config

    path = folder / CONFIG
    try:
        config = read_config(path)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no CLIP: {CONFIG} is missing") from error
    decoder = (*CLIPTextCfg.__dataclass_fields__, "dim_head", "n_queries", "attn_pooler_heads")
    _check_keys(config, ("model_cfg", "preprocess_cfg"), f"{path}")
    model = _part(config, "model_cfg", _MODEL, path)
    _part({"preprocess_cfg": {}, **config}, "preprocess_cfg", _PREPROCESSING, path)
    vision = _part(model, "vision_cfg", tuple(CLIPVisionCfg.__dataclass_fields__), path)
    text = _part(model, "text_cfg", tuple(CLIPTextCfg.__dataclass_fields__), path)
    multimodal = _part({"multimodal_cfg": {}, **model}, "multimodal_cfg", decoder, path)
    for tower in (text, multimodal):
        _part({"tokenizer_kwargs": {}, **tower}, "tokenizer_kwargs", _TOKENIZER, path)
        for key in _NAMES_A_HUB:
            if tower.get(key) is not None:
                raise ValueError(
                    f"{path} has {key} {short(tower[key], 60)}, which would be downloaded: "
                    "use a CLIP whose text tower is open_clip's own"
                )
    trunk = vision.get("timm_model_name")
    if trunk is not None and not (
        isinstance(trunk, str) and not {":", "/", "\\"} & {*trunk} and timm.is_model(trunk)
    ):
        raise ValueError(f"{path}: timm_model_name {short(repr(trunk), 60)} is not a timm model")
    return model


def _part(config: dict[str, Any], name: str, known: tuple[str, ...], path: Path) -> dict[str, Any]:
    part = config.get(name)
    if part is None and name == "tokenizer_kwargs":
        return {}
    if not isinstance(part, dict):
        raise ValueError(f"{path} has no valid {name}")
    _check_keys(part, known, f"{path}: {name}")
    return part


def _check_keys(config: dict[str, Any], known: tuple[str, ...], name: str) -> None:
    if unknown := [key for key in config if key not in known]:
        raise ValueError(f"{name} has {short(unknown[0], 60)}, which is not an option of a CLIP")


def _check_size(open_clip: Any, name: str, folder: Path) -> None:
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth")]
    size = max((path.stat().st_size for path in files if path.is_file()), default=0)
    root = logging.getLogger()
    was_disabled, root.disabled = root.disabled, True  # it warns that there are no weights
    try:
        with torch.device("meta"):  # has shapes, but no memory
            network = open_clip.create_model(name, load_weights=False, device="meta")
    finally:
        root.disabled = was_disabled
    needed = sum(value.numel() for value in network.state_dict().values())
    if needed > 2 * size + (1 << 20):
        raise ValueError(f"its {CONFIG} needs {needed} numbers, its largest file has {size} bytes")


class CLIPFeatures(NetworkFeatures):
    """CLIP image embeddings of length 1, compared by cosine; the text tower is not kept.

    Args:
        model: open_clip's architecture, e.g. ViT-B-32; not used if ``path`` is a folder.
        pretrained: open_clip's published weights, e.g. laion2b_s34b_b79k (downloaded).
        path: instead, a local checkpoint (safetensors, or a state dict loaded with
            ``weights_only``), or a folder with open_clip_config.json and a checkpoint.
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
        is_folder = self.path is not None and self.path.is_dir()
        if self.path is not None:
            if not self.path.exists():
                raise FileNotFoundError(f"no CLIP checkpoint at {self.path}")
            if is_folder:
                check_plain_folder(self.path)
            elif not self.path.is_file():
                raise ValueError(f"{self.path} is not a plain file")  # a device never ends
        self.model = None if is_folder else model
        self.pretrained = pretrained
        tower, config = self._load()
        self.weights_sha256 = state_hash(tower)
        super().__init__(tower, Preprocessing.of_open_clip(config), dtype)

    def _load(self) -> tuple[Any, dict[str, Any]]:
        import open_clip  # slow: takes seconds

        if self.model is None:
            if self.path is None:
                raise ValueError("CLIP features need a model, as ViT-B-32")
            clip = load_clip(self.path)
            return clip.visual, open_clip.get_model_preprocess_cfg(clip)
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
        weights = self.pretrained or str(self.path)
        with unreadable(f"CLIP {self.model} cannot be made of {weights}", OSError):
            clip = open_clip.create_model(self.model, weights, require_pretrained=True)
        return clip.visual, open_clip.get_model_preprocess_cfg(clip)

    def run(self, inputs: Tensor) -> Tensor:
        """The image tower's projected embedding (B, D)."""
        output = self.network(inputs)
        # Some towers (CoCa's) return their tokens as well.
        return output[0] if isinstance(output, tuple) else output

    def describe(self) -> dict[str, Any]:
        """Model, weights, the image tower's hash and the preprocessing."""
        return self._describe(
            "clip",
            self.weights_sha256,
            model=self.model,
            pretrained=self.pretrained,
            path=None if self.path is None else str(self.path),
        )
