"""Extractors of tiny random networks, each from weights of its own."""

import json

import open_clip
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from tiny_networks import CLIP_CONFIG, SMALL_TIMM, Tiny, torchscript

from memfree.retrieval import CLIPFeatures, LatentFeatures, SSCDFeatures, TimmFeatures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return Tiny()


@pytest.fixture(scope="module")
def sscd_file(folder, tiny):
    return torchscript(folder / "sscd.pt", tiny)


@pytest.fixture(scope="module")
def clip_folder(folder):
    torch.manual_seed(1)
    model = open_clip.CLIP(**CLIP_CONFIG)
    path = folder / "clip"
    path.mkdir()
    settings = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}
    config = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": settings}
    (path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), path / "open_clip_model.safetensors")
    return path


@pytest.fixture(scope="module")
def vae_folder(folder):
    torch.manual_seed(2)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        layers_per_block=1,
        scaling_factor=0.7,
        shift_factor=0.1,
    )
    vae.save_pretrained(folder / "pipeline" / "vae")
    return folder / "pipeline"


@pytest.fixture(scope="module")
def extractors(sscd_file, clip_folder, vae_folder):
    return {
        "sscd": SSCDFeatures(sscd_file, trust_file=True),
        "clip": CLIPFeatures(None, path=clip_folder),
        "timm": TimmFeatures(SMALL_TIMM),
        "latents": LatentFeatures.from_folder(vae_folder),
    }
