"""PRSS: guidance moves away from the memorized prompt, which becomes its anchor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from memfree.conditions import SAME, Encode, TextConditions, cosines, sentences
from memfree.diffusion_math import eps_change, per_sample
from memfree.guidance.baselines.options import PromptEmbeddingOptions, PromptReanchoringOptions
from memfree.guidance.baselines.prompt_embedding import optimized
from memfree.guidance.baselines.wen_norm import branches, eps_norm, magnitude, size_factor
from memfree.guidance.mitigation import Mitigation
from memfree.guidance.prediction import Guidance, Prediction, combine


class SemanticSearch:
    """Tries the prompt, then its nearest candidates until ‖ε(y_mod) − ε_∅‖ ≤ trigger."""

    def __init__(self, prompts: Sequence[str], count: int) -> None:
        self.prompts = list(prompts)
        self.count = min(count, len(self.prompts))
        self._sentences: Tensor | None = None

    def __call__(
        self, prediction: Prediction, norm: Tensor, trigger: float
    ) -> tuple[TextConditions, Tensor]:
        """y_mod at the first step and which samples trigger, given ``norm`` (B,) = ‖ε(y) − ε_∅‖."""
        if prediction.encode is None:
            raise ValueError("prompt re-anchoring (prss) needs the model's text encoder")
        conditions = prediction.conditions
        assert isinstance(conditions, TextConditions) and prediction.output_uncond is not None
        triggered = norm > trigger
        parts = {name: part.clone() for name, part in _parts(conditions).items()}
        searching = triggered.nonzero().squeeze(1)
        best = norm.clone()
        ranked = self._ranked(prediction.encode, conditions[searching])
        place = torch.arange(len(searching), device=norm.device)
        for column in range(self.count):
            if not len(searching):
                break
            chosen = [self.prompts[row] for row in ranked[place, column].tolist()]
            encoded = prediction.encode(chosen)
            output = prediction.denoise(prediction.x_t[searching], encoded)
            m = eps_norm(prediction, output - prediction.output_uncond[searching])
            better = m < best[searching]
            rows = searching[better]
            best[rows] = m[better]
            for name, part in _parts(encoded).items():
                if name in parts:
                    parts[name][rows] = part[better].to(parts[name])
            above = m > trigger
            searching, place = searching[above], place[above]
        return TextConditions(**parts), triggered

    def _ranked(self, encode: Encode, conditions: TextConditions) -> Tensor:
        wanted = conditions.sentence()
        if self._sentences is None and len(wanted):
            self._sentences = sentences(encode, self.prompts)
        if self._sentences is None:
            return torch.empty(0, self.count, dtype=torch.int64)
        similarity = cosines(wanted, self._sentences.to(wanted))
        # A candidate this similar to the prompt is the prompt itself.
        similarity = similarity.masked_fill(similarity > SAME, -torch.inf)
        # Row by row and stable: a sample's candidates do not depend on its batch.
        order = [row.argsort(descending=True, stable=True)[: self.count] for row in similarity]
        return torch.stack(order)


def _parts(conditions: TextConditions) -> dict[str, Tensor]:
    return {name: part for name, part in vars(conditions).items() if part is not None}


class PromptReanchoring(Mitigation):
    """PRSS: classifier-free guidance with another prompt y_mod, anchored at the memorized one.

    With m = ‖ε(y_mod) − ε_∅‖, c = (s·l − thr)/(s − 1) and s_pr = min((m − c)/(thr − c)·s, s):
    ε̂ = ε(y) + s_pr·(ε(y_mod) − ε(y)) + (s − s_pr)·(ε(y_mod) − ε_∅) where m > l, and
    ε̂ = ε_∅ + s·(ε(y_mod) − ε_∅) elsewhere. At m = l both are equal (s_pr = 1).

    Source: Chen et al., "Enhancing Privacy-Utility Trade-offs to Mitigate Memorization in Diffusion
    Models", CVPR 2025, arXiv 2504.18032, prompt re-anchoring (PR) and semantic prompt search (SS).
    Their language model writes 25 alternatives to a prompt; here they are the nearest of the given
    ``prompts``, by the mean of their token vectors (not needed for ``optimized``).
    """

    def __init__(
        self,
        prompts: Sequence[str] = (),
        options: PromptReanchoringOptions = PromptReanchoringOptions(),  # noqa: B008 - read only
    ) -> None:
        if options.target >= options.threshold:
            raise ValueError(
                f"--mitigation.target {options.target:g} must be below "
                f"--mitigation.threshold {options.threshold:g}"
            )
        if options.alternative == "search" and not prompts:
            raise ValueError(
                "--mitigation.alternative search chooses among the captions of the index: give "
                "--index of captioned images, or pass --mitigation.alternative optimized"
            )
        self.options = options
        self.prompts_to_search = list(prompts)

    def guidances(self) -> list[Guidance]:
        """The guidance that finds y_mod at the first step and re-anchors from there on."""
        searches = self.options.alternative == "search"
        search = SemanticSearch(self.prompts_to_search, self.options.candidates)
        return [_Reanchoring(self.options, search if searches else None)]


def reanchoring_scale(m: Tensor, target: float, threshold: float, guidance_scale: float) -> Tensor:
    """s_pr of PRSS for magnitudes m (n,): 1 at l, s_0 from thr (above l) on, linear between."""
    c = (guidance_scale * target - threshold) / (guidance_scale - 1)
    return ((m - c) / (threshold - c) * guidance_scale).clamp(max=guidance_scale)


class _Reanchoring:
    def __init__(self, options: PromptReanchoringOptions, search: SemanticSearch | None) -> None:
        self.options = options
        self.search = search

    @torch.no_grad()
    def __call__(self, prediction: Prediction) -> Prediction:
        cond, uncond = branches(prediction, "prompt re-anchoring (prss)")
        if (s := prediction.guidance_scale) <= 1:
            raise ValueError(
                f"prompt re-anchoring (prss) needs --guidance_scale above 1, not {s:g}"
            )
        factor = size_factor(tuple(prediction.x_t.shape[1:]), self.options.per_element)
        if self not in prediction.memory:
            prediction.memory[self] = self._alternatives(prediction, factor)
        modified, triggered = prediction.memory[self]
        rows = triggered.nonzero().squeeze(1)
        if not len(rows):
            return prediction
        y, u = cond[rows], uncond[rows]
        y_mod = prediction.denoise(prediction.x_t[rows], modified[rows])
        m = eps_norm(prediction, y_mod - u)
        target, threshold = self.options.target * factor, self.options.threshold * factor
        s_pr = reanchoring_scale(m, target, threshold, s).to(y.dtype)
        s_pr, anchor = per_sample(s_pr, y), per_sample(m > target, y)
        # The coefficients of the outputs sum to 1: the formula holds for v as for ε.
        anchored = y + s_pr * (y_mod - y) + (s - s_pr) * (y_mod - u)
        chosen = torch.where(anchor, anchored, combine(y_mod, u, s))
        output = prediction.output.clone()
        output[rows] = prediction.as_stepped(chosen, y_mod)
        return replace(prediction, output=output).activated(triggered)

    def _alternatives(self, prediction: Prediction, factor: float) -> tuple[TextConditions, Tensor]:
        assert isinstance(prediction.conditions, TextConditions)
        if self.search is not None:
            norm = magnitude(prediction, "prompt re-anchoring (prss)")
            return self.search(prediction, norm, self.options.trigger * factor)
        assert prediction.output_uncond is not None
        x_t, uncond = prediction.x_t.clone(), prediction.output_uncond
        alpha_bar, kind = prediction.alpha_bar.clone(), prediction.prediction_type

        def difference(conditions: TextConditions, rows: Tensor) -> Tensor:
            change = prediction.denoise(x_t[rows], conditions) - uncond[rows]
            return eps_change(change, alpha_bar, kind)

        settings = PromptEmbeddingOptions(target=self.options.trigger)
        return optimized(prediction.conditions, difference, settings, factor)
