"""Multiplicity guidance: the posterior of the empirical distribution without its repetitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memfree.conditions import SAME, Conditions, Encode, TextConditions, cosines, sentences
from memfree.diffusion_math import bounded, output_change_from_x_0, per_sample
from memfree.full_precision import full_precision
from memfree.guidance.equations import check_at_least_0
from memfree.guidance.prediction import Prediction, row_norm

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex
    from memfree.retrieval.search import References


def caption_kernel(cosine: Tensor, bandwidth: float) -> Tensor:
    """K = exp(−(1 − cos)/bandwidth) of sentence vectors' cosines; 1 for equal captions."""
    equal = cosine > SAME
    if bandwidth == 0:
        return equal.float()
    return torch.where(equal, 1.0, ((cosine - 1) / bandwidth).exp())


class LabelWeights:
    """Records of each reference under a label: m_i(y), the records of i with label y.

    Deduplicated, a group has one record with any of its labels: m_i(y) / Σ_group m, over all
    labels, as in ``CaptionWeights``. Records without a label count under every label.
    """

    def __init__(self, index: ReferenceIndex) -> None:
        assert index.items.label_records is not None
        self._row, label, records = index.items.label_records
        count = len(index)
        labelled = torch.zeros(count, dtype=torch.int64, device=label.device)
        labelled.index_add_(0, self._row, records)
        unlabelled = (index.multiplicity.to(labelled) - labelled).clamp(min=0)
        # Double: float32 would round the shares of large groups before their logarithm.
        group = index.group_multiplicity.to(label.device).double()
        m = (records + unlabelled[self._row]).double()
        self._log_m, self._log_1 = m.log().float(), (m / group[self._row]).log().float()
        self._any_log_m = unlabelled.double().log().float()
        self._any_log_1 = (unlabelled / group).log().float()
        # Where each label's records lie in the rows above, known to the host.
        numbers = torch.bincount(label, minlength=index.num_classes or 0).tolist()
        self._slices = [
            slice(end - n, end) for n, end in zip(numbers, accumulate(numbers), strict=True)
        ]

    def __call__(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Log-weights for one record a group and for all records, each (len(labels), N)."""
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
    """Records weighed by caption: m_i(y) = Σ_c K(y, c)·(records of i with caption c).

    K is ``caption_kernel``. Deduplicated, a group has one record with any of its captions: m_i(y) /
    Σ_group m. Records without a caption count under every prompt, as in ``AskedRecords``.
    """

    def __init__(self, index: ReferenceIndex, bandwidth: float) -> None:
        if index.captions is None:
            raise ValueError(
                "multiplicity guidance of text-to-image needs an index with captions: build it on "
                "a captioned data set"
            )
        check_at_least_0(caption_bandwidth=bandwidth)
        self.bandwidth = bandwidth
        table = index.items.conditions.filter(index.items.conditions["caption"].is_valid())
        columns = {name: table[name].to_pylist() for name in ("row", "caption", "count")}
        self.captions = sorted(set(columns["caption"]))
        number = {caption: i for i, caption in enumerate(self.captions)}
        device = index.device
        self._caption = torch.tensor(
            [number[caption] for caption in columns["caption"]], device=device
        )
        self._row = torch.tensor(columns["row"], device=device)
        self._count = torch.tensor(columns["count"], dtype=torch.float32, device=device)
        captioned = self._count.new_zeros(len(index)).index_add_(0, self._row, self._count)
        self._uncaptioned = (index.multiplicity.to(captioned) - captioned).clamp(min=0)
        self._log_group = index.group_multiplicity.float().log().to(device)
        self._sentences: Tensor | None = None
        self._encoder: object = None

    def __call__(self, prompts: TextConditions, encode: Encode | None) -> tuple[Tensor, Tensor]:
        """Log-weights for one record a group and for all records, each (len(prompts), N)."""
        kernel = caption_kernel(self._cosine(prompts, encode), self.bandwidth)
        m = self._uncaptioned.repeat(len(prompts), 1)
        m.index_add_(1, self._row, kernel[:, self._caption] * self._count)
        log_m = m.log()
        log_1 = log_m - self._log_group
        # Where no record fits, equal weights in both correct nothing.
        none = (m.sum(dim=1) == 0)[:, None]
        return log_1.masked_fill(none, 0.0), log_m.masked_fill(none, 0.0)

    def share_of_first_records(self, prompts: TextConditions, encode: Encode | None) -> Tensor:
        """Share that deduplication leaves of the records captioned with the prompt, (B,).

        Σ_i m_i(y)/m_i / Σ_i m_i(y) over references i with caption y, uncaptioned records left out:
        1 if none is repeated or has this caption, 1/m if one image with m records alone has it.
        """
        records = (self._cosine(prompts, encode) > SAME).float()[:, self._caption] * self._count
        total = records.sum(dim=1)
        left = (records / self._log_group.exp()[self._row]).sum(dim=1)
        return torch.where(total > 0, left / total.clamp(min=1), 1.0)

    def _cosine(self, prompts: TextConditions, encode: Encode | None) -> Tensor:
        if encode is None:
            raise ValueError("captions cannot be compared with prompts without a text encoder")
        if self._sentences is None or self._encoder != encode:
            self._sentences, self._encoder = sentences(encode, self.captions), encode
        return cosines(prompts.sentence(), self._sentences)


EXACT_CANDIDATES = 32  # Leading references with exact differences in the softmax
MAX_ELEMENTS = 1 << 26  # Of (samples × references) or (samples × candidates × D) at once
ROUNDING = 2.0**-24  # Half a unit in the last place of 1 in float32, of weights that sum to 1


class EmpiricalPosterior:
    """E[x_0 | x_t] over weighted references: the optimal denoiser of the empirical distribution.

    μ_w(x_t) = Σ_i softmax_i(−‖x_t − √ᾱ r_i‖² / (2(1−ᾱ)) + log w_i) · r_i, of centred references.
    Leading candidates get exact differences: at little noise float32 is too coarse for expanded
    squares alone.
    """

    def __init__(self, references: References) -> None:
        self.references = references

    def shifted(self, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        """x_t − √ᾱ·centre, (B, D): noisy images of the centred references."""
        return x_t - bounded(alpha_bar).sqrt() * self.references.centre

    def expanded_square(self, shifted: Tensor, alpha_bar: Tensor) -> Tensor:
        """−‖x_t − √ᾱ r_i‖²/(2(1−ᾱ)) up to a constant a row, (B, N), from ``shifted``."""
        alpha_bar = bounded(alpha_bar)
        products = self.references.products(shifted).mul_(alpha_bar.sqrt())
        return products.sub_(alpha_bar / 2 * self.references.squared_norms).div_(1 - alpha_bar)

    def refined(
        self, logits: Tensor, shifted: Tensor, alpha_bar: Tensor, log_weights: Tensor
    ) -> Tensor:
        """``logits`` with exact differences for the leading references of weight > 0."""
        alpha_bar = bounded(alpha_bar)
        counted = logits.masked_fill(log_weights == -torch.inf, -torch.inf)
        top, rows = counted.topk(min(EXACT_CANDIDATES, logits.shape[1]), dim=1)
        leading = alpha_bar.sqrt() * self.references.centred_rows(rows)  # (B, candidates, D)
        exact = -(shifted[:, None] - leading).square().sum(dim=2) / (2 * (1 - alpha_bar))
        # Both are known up to a constant a row; relative to the leading candidate they agree, and
        # are small where float32 is fine enough.
        return (logits - top[:, :1]).scatter(1, rows, exact - exact[:, :1])

    def mean_difference(
        self,
        logits: Tensor,
        shifted: Tensor,
        alpha_bar: Tensor,
        log_weights_1: Tensor,
        log_weights_m: Tensor,
    ) -> Tensor:
        """μ_1 − μ_m at x_t, (B, D), from ``expanded_square`` and log-weights (N,) or (B, N)."""
        log_likelihood = self.refined(logits, shifted, alpha_bar, log_weights_m)
        p_1 = torch.softmax(log_likelihood + log_weights_1, dim=1)
        p_m = torch.softmax(log_likelihood + log_weights_m, dim=1)
        # Σ (p_1 − p_m) = 0: the centre drops out.
        return self.weighted_sum(p_1 - p_m)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Σ_i w_i·r_i (B, D) of the centred references; w (B, N) differences of posterior weights.

        Weights of sum below ``ROUNDING`` count as 0: CPUs are slow on denormals. A CPU multiplies
        only references with a weight; a GPU would have to wait to know which.
        """
        count = weights.shape[1]
        weights = weights.masked_fill(weights.abs() < ROUNDING / count, 0.0)
        if weights.device.type != "cpu":
            return self.references.weighted_sum(weights)
        used = weights.any(dim=0).nonzero().squeeze(1)
        dimension = self.references.vectors.shape[1]
        if len(used) > min(count // 4, MAX_ELEMENTS // dimension):
            return self.references.weighted_sum(weights)
        with full_precision(weights.device):
            return weights[:, used] @ self.references.centred_rows(used)


class MultiplicityGuidance:
    """x̂_0 ← x̂_0 + κ·(μ_1(x_t) − μ_m(x_t)) in each branch of classifier-free guidance.

    m counts the records of each reference; 1 gives every group one record, shared in proportion:
    m_i / Σ_group m. The conditional branch counts its own label's records alone, or weighs records
    by how their captions fit the prompt. Where every group has one record nothing changes, exactly.

    Args:
        index: references in the denoiser's own space, with multiplicities (and labels or captions
            for conditional use), on the device of the samples.
        strength: κ; 1 is the difference itself, 0 changes nothing.
        caption_bandwidth: how far captions other than the prompt count; see ``CaptionWeights``.
        damped: a caption of repeated images counts as after deduplication, ε_c ← ε_u + e(y)·(ε_c −
            ε_u), e(y) of ``CaptionWeights.share_of_first_records``; other captions change nothing,
            exactly. It helps where one image has all the weight, as there μ_1 = μ_m.
    """

    def __init__(
        self,
        index: ReferenceIndex,
        strength: float = 1.0,
        caption_bandwidth: float = 0.0,
        damped: bool = False,
    ) -> None:
        check_at_least_0(strength=strength)
        if index.metric != "l2":
            raise ValueError(
                "multiplicity guidance needs an index of pixels (or latents), not of "
                f"{index.metric} embeddings"
            )
        self.index = index
        self.strength = strength
        self.caption_bandwidth = caption_bandwidth
        self.damped = damped
        self.posterior = EmpiricalPosterior(index.references)
        m = index.multiplicity.double()
        share = m / index.group_multiplicity.to(m).clamp(min=1)
        self._log_m, self._log_1 = m.log().float(), share.log().float()  # −∞ where there is none
        self._nothing_repeats = bool((self._log_m == self._log_1).all())
        self._labels = None if index.num_classes is None else LabelWeights(index)

    @cached_property
    def _captions(self) -> CaptionWeights:
        return CaptionWeights(self.index, self.caption_bandwidth)

    @property
    def needs_unconditional(self) -> bool:
        """Whether a prompt may be damped, which takes ε_u even where s_0 is 1."""
        return self.damped and self.strength > 0 and not self._nothing_repeats

    @property
    def needs_text_encoder(self) -> bool:
        """Whether captions are compared with prompts."""
        return self.index.captions is not None and self.strength > 0 and not self._nothing_repeats

    @torch.no_grad()
    def __call__(self, prediction: Prediction) -> Prediction:
        """Correct both branches and recombine them; later denoiser calls are corrected too."""
        values, size = prediction.x_t.shape[1:].numel(), self.index.vectors.shape[1]
        if values != size:
            raise ValueError(
                f"multiplicity guidance: x_t has {values} values, the references have {size}: "
                "index them in the denoiser's own space, for text-to-image its latents"
            )
        norm = prediction.x_t.new_zeros(len(prediction.x_t), dtype=torch.float32)
        recorded = prediction.recorded(g_mul_norm=norm)
        if self.strength == 0 or self._nothing_repeats:
            return recorded
        cond, uncond = prediction.output_cond, prediction.output_uncond
        given = {"cond": (cond, prediction.conditions), "uncond": (uncond, None)}
        branches = {name: (out, y) for name, (out, y) in given.items() if out is not None}
        outputs = self._corrected(prediction, prediction.x_t, [*branches.values()])
        new = dict(zip(branches, outputs, strict=True))

        def denoise(x_t: Tensor, conditions: Conditions | None) -> Tensor:
            output = prediction.denoise(x_t, conditions)
            return self._corrected(prediction, x_t, [(output, conditions)])[0]

        if self.damped and isinstance(prediction.conditions, TextConditions):
            new["cond"] = self._damped(prediction, new["cond"], new.get("uncond"), denoise)
        corrected = replace(recorded, denoise=denoise).with_branches(
            new.get("cond"), new.get("uncond")
        )
        moved = corrected.clean_estimate() - prediction.clean_estimate()
        in_eps = (prediction.alpha_bar / (1 - prediction.alpha_bar)).sqrt()
        return corrected.recorded(g_mul_norm=in_eps * row_norm(moved))

    def _damped(
        self,
        prediction: Prediction,
        cond: Tensor,
        uncond: Tensor | None,
        denoise: Callable[[Tensor, None], Tensor],
    ) -> Tensor:
        if self not in prediction.memory:
            assert isinstance(prediction.conditions, TextConditions)
            share = self._captions.share_of_first_records(prediction.conditions, prediction.encode)
            prediction.memory[self] = share, (share < 1).nonzero().squeeze(1)
        share, rows = prediction.memory[self]
        if not len(rows):
            return cond
        base = denoise(prediction.x_t[rows], None) if uncond is None else uncond[rows]
        damped = cond.clone()
        damped[rows] = base + per_sample(share[rows], base) * (cond[rows] - base)
        return damped

    def _corrected(
        self,
        prediction: Prediction,
        x_t: Tensor,
        branches: Sequence[tuple[Tensor, Conditions | None]],
    ) -> list[Tensor]:
        """Outputs of the denoiser at x_t, each with its conditions (None: all references)."""
        flat, (count, size) = x_t.flatten(1).float(), self.index.vectors.shape
        alpha_bar = prediction.alpha_bar
        chunk = max(1, MAX_ELEMENTS // max(count, EXACT_CANDIDATES * size))
        parts: list[list[Tensor]] = [[] for _ in branches]
        with torch.autocast(x_t.device.type, enabled=False):
            for rows in torch.arange(len(flat), device=flat.device).split(chunk):
                shifted = self.posterior.shifted(flat[rows], alpha_bar)
                logits = self.posterior.expanded_square(shifted, alpha_bar)
                for part, (output, conditions) in zip(parts, branches, strict=True):
                    log_1, log_m = self._log_1, self._log_m
                    if conditions is not None:
                        log_1, log_m = self._conditional_weights(prediction, conditions[rows])
                    delta = self.posterior.mean_difference(logits, shifted, alpha_bar, log_1, log_m)
                    change = output_change_from_x_0(
                        self.strength * delta.reshape(output[rows].shape),
                        alpha_bar,
                        prediction.prediction_type,
                    )
                    part.append(output[rows] + change.to(output.dtype))
        return [torch.cat(part) for part in parts]

    def _conditional_weights(
        self, prediction: Prediction, conditions: Conditions
    ) -> tuple[Tensor, Tensor]:
        if isinstance(conditions, TextConditions):
            return self._captions(conditions, prediction.encode)
        if self._labels is None:
            raise ValueError(
                "class-conditional multiplicity guidance needs an index with labels: build it on "
                "a labelled data set"
            )
        return self._labels(conditions)
