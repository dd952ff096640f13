"""Train a diffusion model on a dataset folder: python train.py --help."""

from memfree.cli import run
from memfree.training import train

if __name__ == "__main__":
    run(train)
