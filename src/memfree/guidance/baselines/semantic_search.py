"""PRSS's prompt search: of the prompts that say nearly the same, one that pulls less."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memfree.conditions import SAME, Encode, TextConditions, cosines, sentences
from memfree.guidance.baselines.magnitude import eps_norm
from memfree.guidance.prediction import Prediction


class SemanticSearch:
    """Tries the nearest candidates in turn until ‖ε(y_mod) − ε_∅‖ is at most a trigger.

    As in the authors' program of PRSS, the prompt itself is the first candidate; where no candidate
    is below the trigger, the one with the smallest magnitude is taken.

    Args:
        prompts: candidates for all samples.
        count: how many of the nearest are tried for a sample.
    """

    def __init__(self, prompts: Sequence[str], count: int) -> None:
        self.prompts = list(prompts)
        self.count = min(count, len(self.prompts))
        self._sentences: Tensor | None = None

    def __call__(
        self, prediction: Prediction, norm: Tensor, trigger: float
    ) -> tuple[TextConditions, Tensor]:
        """y_mod of a batch at its first step, and which samples are above the trigger.

        Args:
            prediction: of the first step, with both branches and the text encoder.
            norm: ‖ε(y) − ε_∅‖ of the prompts, (B,).
            trigger: magnitude at which the search ends.

        Raises:
            ValueError: there is no text encoder.
        """
        if prediction.encode is None:
            raise ValueError("prompt re-anchoring (prss) needs the model's text encoder")
        conditions = prediction.conditions
        assert isinstance(conditions, TextConditions) and prediction.output_uncond is not None
        triggered = norm > trigger
        embeddings = conditions.embeddings.clone()
        pooled = None if conditions.pooled is None else conditions.pooled.clone()
        mask = None if conditions.mask is None else conditions.mask.clone()
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
            embeddings[rows] = encoded.embeddings[better].to(embeddings)
            if pooled is not None and encoded.pooled is not None:
                pooled[rows] = encoded.pooled[better].to(pooled)
            if mask is not None and encoded.mask is not None:
                mask[rows] = encoded.mask[better].to(mask)
            going_on = m > trigger
            searching, place = searching[going_on], place[going_on]
        return TextConditions(embeddings, pooled, mask), triggered

    def _ranked(self, encode: Encode, conditions: TextConditions) -> Tensor:
        """Rows of the candidates for each prompt, nearest first, (n, count) int64."""
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
