"""Draw samples from a trained model, with or without a mitigation of memorization."""

from memfree.cli import run_command

if __name__ == "__main__":
    run_command("sample")
