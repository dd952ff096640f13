"""Studies: the same models sampled in many ways, over several training seeds."""

from memfree.study.grid import study

__all__ = ["study"]
