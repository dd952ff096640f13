"""How many training records of the nearest image a sample's prompt asks for: m(y)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memfree.conditions import Encode, TextConditions, cosines, sentences
from memfree.guidance.condition_weights import caption_kernel
from memfree.guidance.prediction import Prediction
from memfree.guidance.similarity import Match

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex


_Known = dict[int, tuple[Tensor, Tensor]]
"""By group, the sentence vectors of its captions and their records."""


class AskedRecords:
    """m(y) = m − Σ_c (1 − K(y, c))·m_c of the nearest image's group, at least 1.

    m are the group's records, m_c those with caption c, K the kernel of ``caption_kernel``. Records
    with other captions than the prompt did not teach the model to answer it with this image; those
    without a caption count under every prompt.
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
        self._kept: tuple[Encode | None, _Known] = None, {}

    def __call__(self, prediction: Prediction, match: Match, wanted: Tensor) -> Tensor:
        """m(y) of the nearest image where ``wanted`` (B,) bool, its m elsewhere, (B,) float32."""
        nearest, records = match.rows[:, 0], self.all(match)
        prompts = prediction.conditions
        if self.bandwidth is None or self.index.captions is None:
            return records
        if not isinstance(prompts, TextConditions) or prediction.encode is None:
            return records
        groups = self.index.group.to(nearest.device)[nearest]
        groups, order = torch.where(wanted & (records > 1), groups, -1).sort(stable=True)
        start = 0
        # The host waits for the device once: the samples of a group stand together in ``order``.
        for group, samples in Counter(groups.tolist()).items():
            same, start = order[start : start + samples], start + samples
            # Records without a caption are asked for by every prompt.
            if counts := self.index.items.caption_counts.get(group):
                known, m = self._encoded(prediction, group, counts)
                fit = caption_kernel(cosines(prompts[same].sentence(), known), self.bandwidth)
                records[same] = (records[same] - ((1 - fit) * m).sum(dim=1)).clamp(min=1)
        return records

    def all(self, match: Match) -> Tensor:
        """m of each sample's nearest image, whatever the prompt, (B,) float32."""
        nearest = match.rows[:, 0]
        return self.index.group_multiplicity.to(nearest.device)[nearest].float()

    def _encoded(
        self, prediction: Prediction, group: int, counts: Mapping[str, int]
    ) -> tuple[Tensor, Tensor]:
        """Sentence vectors (C, D) of a group's captions and their records (C,).

        They are kept, as the model's encoder is frozen; for one encoder, and every batch keeps to
        its own, whatever other threads ask for.
        """
        encode = prediction.encode
        assert encode is not None
        if self not in prediction.memory:
            encoder, kept = self._kept
            if encoder != encode:
                kept = {}
                self._kept = encode, kept
            prediction.memory[self] = kept
        known: _Known = prediction.memory[self]
        if group not in known:
            vectors = sentences(encode, list(counts))
            records = torch.tensor(list(counts.values()), dtype=torch.float32)
            known[group] = vectors, records.to(vectors.device)
        return known[group]
