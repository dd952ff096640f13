"""Does the autoencoder of a latent model move thresholds? Held-out images, and reconstructed."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from memfree.data import DatasetFolder
from memfree.guidance import Calibration, default_similarity
from memfree.guidance.calibration import measure
from memfree.retrieval import EfficientNetFeatures, PixelFeatures, ReferenceIndex
from memfree.retrieval.features.copy_detection import CopyDetectionFeatures

RATE = 0.01


def main() -> None:
    """Print both thresholds of each feature, and copies among reconstructions by the first."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--dataset", type=Path, required=True, help="of `memfree prepare`")
    parser.add_argument("--model", type=Path, required=True, help="diffusers folder with a vae")
    parser.add_argument("--embedding", type=Path, help="of `memfree train-embedding`")
    given = parser.parse_args()
    data = DatasetFolder(given.dataset)
    images = data.part("calibration").images()
    decoded = reconstructed(given.model, images)
    features = [PixelFeatures(), EfficientNetFeatures()]
    if given.embedding is not None:
        features.append(CopyDetectionFeatures.load(given.embedding))
    print("| features | threshold, images | threshold, reconstructions | of these called copies |")
    print("|---|---|---|---|")
    for each in features:
        index = ReferenceIndex.build(data, each)
        own, others = (measure(index, default_similarity(index), x) for x in (images, decoded))
        print(row(each.describe()["name"], own, others))


@torch.no_grad()
def reconstructed(model: Path, images: Tensor, batch_size: int = 64) -> Tensor:
    """Images (N, C, H, W) in [−1, 1] through the autoencoder and back, as samples leave it."""
    autoencoder = AutoencoderKL.from_pretrained(model / "vae", local_files_only=True).eval()
    parts = [
        autoencoder.decode(autoencoder.encode(part).latent_dist.mode()).sample.clamp(-1, 1)
        for part in images.split(batch_size)
    ]
    return torch.cat(parts)


def row(name: str, own: Calibration, others: Calibration) -> str:
    """One line of the table."""
    threshold = own.threshold(RATE)
    low, high = own.threshold_interval(RATE)
    called = float((others.sigmas > threshold).float().mean())
    return (
        f"| {name} | {threshold:.3f} ({low:.3f} to {high:.3f}) | {others.threshold(RATE):.3f} | "
        f"{100 * called:.2g} % of {len(others.sigmas)}, {own.rate_text(RATE)} expected |"
    )


if __name__ == "__main__":
    main()
