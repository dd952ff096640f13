"""Fixtures of trainings on tiny data."""

from tiny_training import data, make_module, make_trainer

__all__ = ["data", "make_module", "make_trainer"]
