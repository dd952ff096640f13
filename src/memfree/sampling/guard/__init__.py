"""The guard: guidance and verdicts for diffusers pipelines."""

from memfree.sampling.guard.context import guard
from memfree.sampling.guard.guider import AntiMemorizationGuider
from memfree.sampling.guard.report import GuardReport, Verdict

__all__ = ["AntiMemorizationGuider", "GuardReport", "Verdict", "guard"]
