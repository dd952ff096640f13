"""How many training records of the nearest image a sample's prompt asks for: m(y)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memfree.conditions import TextConditions, cosines, sentences
from memfree.guidance.condition_weights import caption_kernel
from memfree.guidance.prediction import Prediction
from memfree.guidance.similarity import Match

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex


class AskedRecords:
    """m(y) = m − Σ_c (1 − K(y, c))·m_c of the nearest image's group, at least 1.

    m are the group's records, m_c those with caption c, K the kernel of ``caption_kernel``. Records
    with other captions than the prompt did not teach the model to answer it with this image.
    Without prompts, captions, a text encoder or a bandwidth all records count: m(y) = m.

    Args:
        index: references.
        bandwidth: of K, in units of cosine distance; 0: equal captions alone; None: m(y) = m.

    Raises:
        ValueError: the bandwidth is negative.
    """

    def __init__(self, index: ReferenceIndex, bandwidth: float | None = None) -> None:
        if bandwidth is not None and bandwidth < 0:
            raise ValueError(f"caption_bandwidth must be at least 0, not {bandwidth:g}")
        self.index = index
        self.bandwidth = bandwidth

    def __call__(self, prediction: Prediction, match: Match) -> Tensor:
        """m(y) of each sample's nearest image, (B,) float32."""
        nearest = match.rows[:, 0]
        records = self.index.group_multiplicity.to(nearest.device)[nearest].float()
        prompts = prediction.conditions
        if self.bandwidth is None or self.index.captions is None:
            return records
        if not isinstance(prompts, TextConditions) or prediction.encode is None:
            return records
        repeated = (records > 1).nonzero().squeeze(1)
        wanted = prompts[repeated].sentence()
        groups = self.index.group.to(nearest.device)[nearest[repeated]].tolist()
        for row, sentence, group in zip(repeated.tolist(), wanted[:, None], groups, strict=True):
            # Records without a caption are asked for by every prompt.
            if counts := self.index.items.caption_counts.get(group):
                known = self._encoded(prediction, group, counts)
                fit = caption_kernel(cosines(sentence, known)[0], self.bandwidth)
                m = torch.tensor(list(counts.values()), dtype=torch.float32, device=fit.device)
                records[row] -= ((1 - fit) * m).sum()
        return records.clamp(min=1)

    def _encoded(self, prediction: Prediction, group: int, captions: Iterable[str]) -> Tensor:
        """Sentence vectors (C, D) of a group's captions, made once a batch."""
        known = prediction.memory.setdefault((self, "captions"), {})
        if group not in known:
            assert prediction.encode is not None
            known[group] = sentences(prediction.encode, list(captions))
        return known[group]
