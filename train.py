"""Train a diffusion model on a dataset folder: python train.py --help."""

from memfree.cli import run_command

if __name__ == "__main__":
    run_command("train")
