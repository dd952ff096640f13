"""Induce, measure and remove the memorization of training images in diffusion models."""

__version__ = "0.1.0"
