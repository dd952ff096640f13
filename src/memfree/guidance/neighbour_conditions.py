"""Neighbour conditions: y_N of AMG, the label or caption of the nearest image (eq. 15, 16)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from memfree.conditions import Conditions, TextConditions, differ
from memfree.guidance.equations import check_at_least_0
from memfree.guidance.options import CAPTION_NEIGHBOURS, CAPTION_RECORDS
from memfree.guidance.prediction import Prediction
from memfree.guidance.similarity import Match

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex
    from memfree.retrieval.options import CaptionPolicy


class NeighbourConditions:
    """y_N of samples: the label of the nearest image, or a caption chosen by a policy.

    Args:
        policy: ``nearest`` (the paper) or ``most_common`` (the authors' code), for captions only.
        neighbours: k, distinct groups that ``most_common`` counts; where the similarity has fewer
            (eq. 9 has one), they are searched again, for the samples that need y_N.
        records: take the most common caption if more training records have it, else the nearest's.
    """

    def __init__(
        self,
        index: ReferenceIndex,
        policy: CaptionPolicy = "nearest",
        neighbours: int = CAPTION_NEIGHBOURS,
        records: int = CAPTION_RECORDS,
    ) -> None:
        groups = int(index.group.max()) + 1
        if policy == "most_common" and not 1 <= neighbours <= groups:
            raise ValueError(
                f"--mitigation.caption_neighbours {neighbours}: the index has {groups} distinct "
                f"groups, use 1 to {groups}"
            )
        check_at_least_0(caption_records=records)
        self.index = index
        self.policy = policy
        self.neighbours = neighbours
        self.records = records

    def __call__(self, prediction: Prediction, match: Match, rows: Tensor) -> Conditions:
        """y_N of ``rows``, one each."""
        if not isinstance(prediction.conditions, TextConditions):
            if self.index.labels is None:
                raise ValueError("c2 needs an index with labels: build it on a labelled data set")
            return self.index.labels.to(match.rows.device)[match.rows[rows, 0]]
        if self.index.captions is None or prediction.encode is None:
            raise ValueError(
                "c2 needs the caption of the nearest image and a text encoder: build the index on "
                "a captioned data set, or set c2 to 0"
            )
        nearest = match.rows[rows]
        if self.policy == "most_common":
            if nearest.shape[1] < self.neighbours:
                nearest = self.index.search(match.vectors[rows], self.neighbours).rows
            nearest = nearest[:, : self.neighbours]
        captions = self.index.duplicated_caption(nearest, self.policy, self.records)
        known = prediction.memory.setdefault((self, "captions"), {})
        if new := [text for text in dict.fromkeys(captions) if text not in known]:
            encoded = prediction.encode(new)
            known.update({text: encoded[slice(i, i + 1)] for i, text in enumerate(new)})
        return TextConditions.cat([known[text] for text in captions])

    def output(self, prediction: Prediction, match: Match, rows: Tensor, s_2: Tensor) -> Tensor:
        """ε_θ(x_t, y_N) of ``rows`` (eq. 16); the denoiser is called where y_N ≠ y and s_2 > 0."""
        assert prediction.output_cond is not None and prediction.conditions is not None
        output = prediction.output_cond[rows].clone()
        places = (s_2 > 0).nonzero().squeeze(1)
        if not len(places):
            return output
        y_n = self(prediction, match, rows[places])
        other = differ(y_n, prediction.conditions[rows[places]]).nonzero().squeeze(1)
        if len(other):
            x_t = prediction.x_t[rows[places[other]]]
            output[places[other]] = prediction.denoise(x_t, y_n[other])
        return output
