"""Draw samples from a trained model, with or without a mitigation of memorization."""

from memfree.cli import run
from memfree.sampling.predict import predict

if __name__ == "__main__":
    run(predict)
