"""Studies: the same models sampled in many ways, over several training seeds."""

from memfree.study.study import study
from memfree.study.text import text_study

__all__ = ["study", "text_study"]
