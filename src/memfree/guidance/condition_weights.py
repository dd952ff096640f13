"""How much each reference counts under a condition: by its labels, or by how its captions fit."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memfree.conditions import SAME, Encode, TextConditions, cosines, sentences

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex


def log_weights(counts: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """log m_i and log(m_i / Σ_group m) of counts (N,), each (N,); −∞ where there is none."""
    m = counts.to(torch.float64)
    total = torch.zeros(groups, dtype=torch.float64, device=m.device)
    total.index_add_(0, group.to(m.device), m)
    share = m / total[group].clamp(min=1)
    return m.log().float(), share.log().float()


def caption_kernel(cosine: Tensor, bandwidth: float) -> Tensor:
    """K: 1 for equal captions, else exp(−(1 − cos)/bandwidth), of sentence vectors' cosines.

    Args:
        cosine: of any shape.
        bandwidth: 0: K is 0 for captions that are not equal.
    """
    equal = cosine > SAME
    if bandwidth == 0:
        return equal.float()
    return torch.where(equal, 1.0, ((cosine - 1) / bandwidth).exp())


class LabelWeights:
    """Records of each reference under a label.

    m_i(y) is the number of records of i with label y. Deduplicated, a group has one record, whose
    label is any of its records': m_i(y) / Σ_group m, over all labels, as in ``CaptionWeights``.
    Records without a label count under every label.

    Args:
        index: references with labels.
    """

    def __init__(self, index: ReferenceIndex) -> None:
        assert index.items.label_records is not None
        self._row, label, records = index.items.label_records
        count = len(index)
        labelled = torch.zeros(count, dtype=torch.int64, device=label.device)
        labelled.index_add_(0, self._row, records)
        unlabelled = (index.multiplicity.to(labelled) - labelled).clamp(min=0)
        # Double, as float32 would round the shares of large groups before their logarithm.
        group = index.group_multiplicity.to(label.device).double()
        m = (records + unlabelled[self._row]).double()
        self._log_m, self._log_1 = m.log().float(), (m / group[self._row]).log().float()
        self._any_log_m = unlabelled.double().log().float()
        self._any_log_1 = (unlabelled / group).log().float()
        # Where each label's records begin in the rows above, for the host to cut them out.
        numbers = torch.bincount(label, minlength=index.num_classes or 0).tolist()
        self._slices = [
            slice(end - n, end) for n, end in zip(numbers, accumulate(numbers), strict=True)
        ]

    def __call__(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Log-weights for one record a group and for all records, each (len(labels), N).

        Raises:
            ValueError: a label that no reference carries.
        """
        count, asked = len(self._any_log_m), labels.tolist()
        slices = []
        for label in asked:
            known = 0 <= label < len(self._slices)
            if not known or self._slices[label].start == self._slices[label].stop:
                raise ValueError(f"label {label} does not occur in the reference index")
            slices.append(self._slices[label])
        log_1, log_m = self._any_log_1.repeat(len(asked), 1), self._any_log_m.repeat(len(asked), 1)
        if slices:
            places = torch.cat([self._row[part] + i * count for i, part in enumerate(slices)])
            log_1.view(-1)[places] = torch.cat([self._log_1[part] for part in slices])
            log_m.view(-1)[places] = torch.cat([self._log_m[part] for part in slices])
        return log_1, log_m


class CaptionWeights:
    """Records of each reference, weighed by how well their captions fit a prompt.

    m_i(y) = Σ_c K(y, c)·(records of i with caption c), with K = 1 for equal embeddings and else
    exp(−(1 − cos)/bandwidth) of the sentence vectors; without bandwidth only equal captions count.
    Deduplicated, a group has one record, whose caption is any of its records': m_i(y) / Σ_group m.
    Records without a caption count under every prompt, as in ``AskedRecords``: any may call them.

    Args:
        index: references with captions.
        bandwidth: of the kernel, in units of cosine distance; 0: equal captions only.
    """

    def __init__(self, index: ReferenceIndex, bandwidth: float) -> None:
        if index.captions is None:
            raise ValueError(
                "multiplicity guidance of text-to-image needs an index with captions: build it on "
                "a captioned data set"
            )
        if bandwidth < 0:
            raise ValueError(f"caption_bandwidth must be at least 0, not {bandwidth:g}")
        self.bandwidth = bandwidth
        table = index.items.conditions.filter(index.items.conditions["caption"].is_valid())
        columns = {name: table[name].to_pylist() for name in ("row", "caption", "count")}
        self.captions = sorted(set(columns["caption"]))
        number = {caption: i for i, caption in enumerate(self.captions)}
        device = index.device
        self._caption = torch.tensor([number[one] for one in columns["caption"]], device=device)
        self._row = torch.tensor(columns["row"], device=device)
        self._count = torch.tensor(columns["count"], dtype=torch.float32, device=device)
        captioned = self._count.new_zeros(len(index)).index_add_(0, self._row, self._count)
        self._uncaptioned = (index.multiplicity.to(captioned) - captioned).clamp(min=0)
        self._log_group = index.group_multiplicity.float().log().to(device)
        self._sentences: Tensor | None = None
        self._encoder: object = None

    def __call__(self, prompts: TextConditions, encode: Encode | None) -> tuple[Tensor, Tensor]:
        """Log-weights for one record a group and for all records, each (len(prompts), N).

        Args:
            prompts: encoded prompts y.
            encode: the text encoder that made them; captions are encoded by it once.

        Raises:
            ValueError: there is no text encoder.
        """
        cosine = self._cosine(prompts, encode)
        kernel = caption_kernel(cosine, self.bandwidth)
        m = self._uncaptioned.repeat(len(prompts), 1)
        m.index_add_(1, self._row, kernel[:, self._caption] * self._count)
        log_m = m.log()
        log_1 = log_m - self._log_group
        # Where no record fits, all references weigh the same in both: nothing is corrected.
        none = (m.sum(dim=1) == 0)[:, None]
        return log_1.masked_fill(none, 0.0), log_m.masked_fill(none, 0.0)

    def share_of_first_records(self, prompts: TextConditions, encode: Encode | None) -> Tensor:
        """Among the records whose caption is the prompt, the share that deduplication leaves, (B,).

        Σ_i m_i(y)/m_i / Σ_i m_i(y), over the references i with caption y: 1 where none of them is
        repeated or none has this caption, 1/m for the caption of one image of m records alone.
        Records without a caption are left out: none was learned with this prompt.
        """
        records = (self._cosine(prompts, encode) > SAME).float()[:, self._caption] * self._count
        total = records.sum(dim=1)
        left = (records / self._log_group.exp()[self._row]).sum(dim=1)
        return torch.where(total > 0, left / total.clamp(min=1), 1.0)

    def _cosine(self, prompts: TextConditions, encode: Encode | None) -> Tensor:
        """Cosines (B, captions) of the sentence vectors of prompts and captions."""
        return cosines(prompts.sentence(), self._encoded(encode))

    def _encoded(self, encode: Encode | None) -> Tensor:
        """Sentence vectors (captions, D) of all captions."""
        if encode is None:
            raise ValueError("captions cannot be compared with prompts without a text encoder")
        if self._sentences is None or self._encoder != encode:
            self._sentences, self._encoder = sentences(encode, self.captions), encode
        return self._sentences
