"""Tiny networks of every kind of extractor, and images for them."""

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision import transforms

SMALL_TIMM = "test_vit.r160_in1k"  # smooth, unlike a network of ReLUs


class Tiny(nn.Module):
    """A network of SSCD's signature."""

    def __init__(self, dimension=512, smooth=nn.GELU):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 5, stride=4)
        self.smooth = smooth()
        self.linear = nn.Linear(8, dimension)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(self.smooth(self.convolution(images)).mean(dim=(2, 3)))


def torchscript(path, network):
    torch.jit.trace(network.eval(), torch.zeros(1, 3, 64, 64)).save(str(path))
    return path


CLIP_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 60, "width": 16, "heads": 2, "layers": 1},
}


NAMES = ["sscd", "clip", "timm", "latents"]


def images_of(count, height=24, width=24, seed=0, channels=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, height, width, generator=generator) * 2 - 1


IMAGENET = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = transforms.Normalize([0.5], [0.5])


def photograph():
    """A smooth picture of 100 × 140 pixels, as PIL and as a tensor."""
    from sklearn.datasets import load_sample_images

    pixels = np.ascontiguousarray(load_sample_images().images[0][:400, :560])
    picture = Image.fromarray(pixels).resize((140, 100))
    tensor = torch.tensor(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    return picture, tensor
