"""Ren's mitigation: shift cross-attention from the prompt's tail to its first token."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memfree.conditions import TextConditions
from memfree.guidance.baselines.options import AttentionRescalingOptions
from memfree.guidance.mitigation import Mitigation, Start

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

COMPARED = 512  # Entries that tell rows apart before they are compared as a whole


class KnownPrompts:
    """Embeddings of a batch's prompts with their lengths, and of its unconditional prompts."""

    def __init__(self) -> None:
        self._known: tuple[Tensor, Tensor, Tensor] | None = None
        self._last: tuple[Tensor, Tensor] | None = None

    def learn(self, embeddings: Tensor, lengths: Sequence[int], unconditional: Tensor) -> None:
        """Replace prompts (B, L, D), their token counts (B,) and no prompts (B, L, D)."""
        tokens = torch.tensor(list(lengths), dtype=torch.int64, device=embeddings.device)
        self._known = embeddings.detach(), tokens, unconditional.detach()
        self._last = None

    def lengths_of(self, embeddings: Tensor) -> Tensor:
        """Prompt length of each row of (N, L, D), (N,) int64; 0 where it is not a known prompt."""
        # All layers of a network receive the same tensor: look it up once.
        if self._last is None or self._last[0] is not embeddings:
            self._last = embeddings, self._look_up(embeddings)
        return self._last[1]

    def _look_up(self, embeddings: Tensor) -> Tensor:
        nothing = torch.zeros(len(embeddings), dtype=torch.int64, device=embeddings.device)
        if self._known is None:
            return nothing
        known, lengths, unconditional = (part.to(embeddings.device) for part in self._known)
        place, is_prompt = _equal_row(embeddings, known.to(embeddings.dtype))
        _, is_unconditional = _equal_row(embeddings, unconditional.to(embeddings.dtype))
        return torch.where(is_prompt & ~is_unconditional, lengths[place], nothing)


def _equal_row(rows: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of (N, L, D): which known row it may equal (N,), and whether it does (N,)."""
    if rows.shape[1:] != known.shape[1:]:
        nowhere = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        return nowhere, nowhere.bool()
    first, second = rows.detach().flatten(1), known.flatten(1)
    stride = max(1, first.shape[1] // COMPARED)
    alike = (first[:, None, ::stride] == second[None, :, ::stride]).all(dim=2)
    place = alike.int().argmax(dim=1)
    return place, (first == second[place]).all(dim=1)


class AttentionRescaling(Mitigation):
    """Cross-attention logits of the conditional prediction: first token × c, padding −∞.

    Source: Ren et al., "Unveiling and Mitigating Memorization in Text-to-image Diffusion Models
    through Cross Attention", ECCV 2024, arXiv 2403.11052, inference-time mitigation. The authors'
    program also masks the unconditional prediction; here only rows whose ``encoder_hidden_states``
    equal a prompt of the last ``embedding`` stage change, in shared batches too. ``count_tokens``
    counts begin and end of text (``TextTools.count_tokens``); masks of the conditions replace it.
    """

    def __init__(
        self,
        count_tokens: Callable[[Sequence[str]], Sequence[int]],
        options: AttentionRescalingOptions = AttentionRescalingOptions(),  # noqa: B008 - read only
    ) -> None:
        self.options = options
        self._count_tokens = count_tokens
        self._lengths: list[int] = []
        self._known = KnownPrompts()

    def prompts(self, prompts: Sequence[str], generators: Sequence[torch.Generator]) -> list[str]:
        """Store each prompt's number of tokens; the prompts stay."""
        self._lengths = list(self._count_tokens(list(prompts)))
        return list(prompts)

    def embedding(self, start: Start) -> TextConditions:
        """Store the embeddings, which identify conditional rows; needs ``prompts`` first."""
        conditions = start.conditions
        if conditions.mask is not None:
            lengths = conditions.mask.sum(dim=1).tolist()
        else:
            images, left = divmod(len(conditions), len(self._lengths) or 1)
            if left or not self._lengths:
                raise ValueError(
                    f"attention rescaling (ren) knows the lengths of {len(self._lengths)} prompts, "
                    f"but {len(conditions)} samples start: give prompts, not embeddings"
                )
            # Pipelines put the images of one prompt next to each other.
            lengths = [length for length in self._lengths for _ in range(images)]
        self._known.learn(conditions.embeddings, lengths, start.unconditional.embeddings)
        return conditions

    @contextmanager
    def around(self, network: Any) -> Generator[None]:
        """Replace the processors of the cross-attention layers of a UNet2DConditionModel."""
        scaled = self.options.scale != 1
        changes = scaled or self.options.mask_padding or self.options.mask_end
        layers = cross_attention_layers(network) if changes else []
        before = [layer.processor for layer in layers]
        try:
            for layer, processor in zip(layers, before, strict=True):
                layer.set_processor(_Rescaled(processor, self._known, self.options))
            yield
        finally:
            for layer, processor in zip(layers, before, strict=True):
                layer.set_processor(processor)


def cross_attention_layers(network: Any) -> list[Any]:
    """The cross-attention layers (diffusers' ``Attention``) of a UNet2DConditionModel."""
    from diffusers import UNet2DConditionModel
    from diffusers.models import attention_processor

    projection = getattr(network, "encoder_hid_proj", None)
    if not isinstance(network, UNet2DConditionModel) or projection is not None:
        raise ValueError(
            "attention rescaling (ren) needs a UNet2DConditionModel that attends to the text "
            f"embedding itself (Stable Diffusion 1, 2 or XL), not {type(network).__name__}"
        )
    plain = (
        attention_processor.AttnProcessor,
        attention_processor.AttnProcessor2_0,
        attention_processor.SlicedAttnProcessor,
        attention_processor.XFormersAttnProcessor,
    )
    unet: Any = network
    layers = [
        module
        for module in unet.modules()
        if isinstance(module, attention_processor.Attention) and module.is_cross_attention
    ]
    for layer in layers:
        if not isinstance(layer.processor, plain) or layer.spatial_norm is not None:
            raise ValueError(
                "attention rescaling (ren) cannot replace the attention processor "
                f"{type(layer.processor).__name__}; remove adapters and fused projections first"
            )
    return layers


class _Rescaled:
    def __init__(
        self, original: Any, known: KnownPrompts, options: AttentionRescalingOptions
    ) -> None:
        self.original = original
        self.known = known
        self.options = options

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        output = self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if encoder_hidden_states is None:
            return output
        lengths = self.known.lengths_of(encoder_hidden_states)
        rows = lengths.nonzero().squeeze(1)
        if not len(rows):
            return output
        changed = rescaled_attention(
            attn,
            hidden_states[rows],
            encoder_hidden_states[rows],
            None if attention_mask is None else attention_mask[rows],
            lengths[rows],
            self.options,
        )
        # Rows that are left alone keep the bits of the original processor on the whole batch.
        return output.index_copy(0, rows, changed.to(output.dtype))


def rescaled_attention(
    attn: Attention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor | None,
    lengths: Tensor,
    options: AttentionRescalingOptions,
) -> Tensor:
    """The layer's output (B, Q, C) with the logits of the first token scaled and others masked.

    Queries are from hidden_states (B, Q, C), keys from the tokens encoder_hidden_states (B, L, D);
    attention_mask is a bias of the logits (B, 1, L), lengths (B,) the tokens of each prompt.
    """
    assert hidden_states.ndim == 3, "cross-attention of a transformer block has tokens as queries"
    residual = hidden_states
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    if attn.norm_cross:
        encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)

    def heads(tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, heads, tokens, d)

    query = heads(attn.to_q(hidden_states))
    key = heads(attn.to_k(encoder_hidden_states))
    value = heads(attn.to_v(encoder_hidden_states))
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    logits = (query @ key.transpose(-1, -2)).float() * attn.scale
    if attention_mask is not None:
        logits = logits + attention_mask[:, None]
    logits = torch.cat([options.scale * logits[..., :1], logits[..., 1:]], dim=-1)
    if options.mask_padding or options.mask_end:
        place = torch.arange(logits.shape[-1], device=logits.device)
        end = (lengths - 1)[:, None]
        hidden = (place == end) & options.mask_end | (place > end) & options.mask_padding
        logits = logits.masked_fill(hidden[:, None, None], -torch.inf)
    attended = logits.softmax(dim=-1).to(value.dtype) @ value
    output = attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))
    if attn.residual_connection:
        output = output + residual
    return output / attn.rescale_output_factor
