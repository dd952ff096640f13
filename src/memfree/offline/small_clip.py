"""Small CLIP: a frozen ImageNet network and a text tower, trained on captions of a dataset."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from memfree.data.random_streams import step_generator
from memfree.models.options import SmallClipOptions
from memfree.offline.copy_detection import augment
from memfree.offline.short_training import adamw_with_cosine
from memfree.retrieval.features.preprocessing import Preprocessing
from memfree.retrieval.features.timm_model import EfficientNetFeatures

PREPROCESSING: dict[str, Any] = {
    "size": [64, 64],
    "mode": "RGB",
    "mean": [127 / 255] * 3,
    "std": [128 / 255] * 3,
    "interpolation": "bilinear",
    "resize_mode": "squash",
    "fill_color": 0,
}
"""open_clip's words for how EfficientNet-Lite0 sees images here."""


def model_config(options: SmallClipOptions) -> dict[str, Any]:
    """open_clip's ``model_cfg``: EfficientNet-Lite0 at 64×64 with a linear head, a transformer."""
    if options.text_width % 32:
        raise ValueError(f"--model.text_width {options.text_width}: use a multiple of 32")
    return {
        "embed_dim": options.embedding,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "timm_drop": float(options.image_dropout),
            "image_size": 64,
        },
        "text_cfg": {
            "context_length": options.context_length,
            "vocab_size": 49408,
            "width": options.text_width,
            "heads": options.text_width // 32,
            "layers": options.text_layers,
        },
    }


class SmallClipModule(pl.LightningModule):
    """Trains text tower and image head of open_clip's CLIP; the trunk keeps its ImageNet weights.

    A thousand images are too few to learn from scratch what an unseen picture shows, so the trunk
    is EfficientNet-Lite0 with the weights that come as a Python package. Its features of augmented
    views are computed once. A batch is a dictionary with ``row`` (B,) and ``caption``, a list.
    """

    def __init__(self, options: SmallClipOptions, seed: int = 0) -> None:
        super().__init__()
        from open_clip import ClipLoss, SimpleTokenizer
        from open_clip.model import CLIP

        self.options, self.seed = options, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model: Any = CLIP(**model_config(options))
        with torch.no_grad():
            self.model.logit_scale.fill_(-torch.tensor(float(options.temperature)).log())
        trunk = EfficientNetFeatures().network.state_dict()
        kept = {name: value for name, value in trunk.items() if not name.startswith("classifier.")}
        self.model.visual.trunk.load_state_dict(kept, strict=True)
        self.model.visual.trunk.requires_grad_(False)
        self.tokenizer = SimpleTokenizer(context_length=options.context_length)
        self._loss = ClipLoss()
        self._prepare = Preprocessing.of_open_clip(PREPROCESSING)
        self.features: Tensor
        self.register_buffer("features", torch.empty(0), persistent=False)

    def train(self, mode: bool = True) -> SmallClipModule:
        """The trunk stays in evaluation mode: its statistics are ImageNet's."""
        super().train(mode)
        self.model.visual.trunk.eval()
        return self

    @torch.no_grad()
    def look_at(self, images: Tensor, batch_size: int = 32) -> None:
        """Compute the trunk's features of every view of images (N, C, H, W) in [-1, 1]."""
        self.train()
        parts = []
        for view in range(self.options.views):
            for start in range(0, len(images), batch_size):
                batch = images[start : start + batch_size]
                if view > 0:
                    generator = step_generator(self.seed, view * len(images) + start, batch.device)
                    batch = augment(batch, self.options.augmentation, generator)
                parts.append(self.model.visual.trunk(self._prepare(batch)))
        self.features = torch.cat(parts).view(self.options.views, len(images), -1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """open_clip's contrastive loss of one random view and thinned captions."""
        generator = step_generator(self.seed, batch_idx, torch.device("cpu"))
        count = len(batch["caption"])
        view = torch.randint(self.options.views, (count,), generator=generator)
        features = self.features[view.to(self.device), batch["row"].to(self.device)]
        captions = [
            thinned(caption, self.options.word_dropout, generator) for caption in batch["caption"]
        ]
        torch.manual_seed(int(torch.randint(1 << 62, (), generator=generator)))  # of dropout
        image = torch.nn.functional.normalize(self.model.visual.head(features), dim=-1)
        text = self.model.encode_text(self.tokenizer(captions).to(self.device), normalize=True)
        # Temperatures below 1/100 are left out, as in CLIP.
        scale = self.model.logit_scale.exp().clamp(max=100)
        return self._loss(image, text, scale)

    def configure_optimizers(self) -> Any:
        """AdamW, a short warm-up, then a cosine to 0."""
        rate, decay = float(self.options.learning_rate), float(self.options.weight_decay)
        return adamw_with_cosine(self, rate, decay)


def thinned(caption: str, probability: float, generator: torch.Generator) -> str:
    """The caption without each word with this probability; never without all of them."""
    words = caption.split()
    if len(words) < 2 or probability == 0:
        return caption
    kept = torch.rand(len(words), generator=generator) >= probability
    kept[int(torch.randint(len(words), (), generator=generator))] = True
    return " ".join(word for word, keep in zip(words, kept.tolist(), strict=True) if keep)
