"""The dense reference of P-EAGLE, K guesses in parallel, with whose results the product must agree.

It was written from docs/peagle.md alone. What is there as in docs/semantics.md (loss, accuracies, norms,
rotary embedding, the arithmetic of a layer around its attention) is taken from judge/dense_reference.py; what
is fed, and which keys are seen, is here. All K * L states of a layer meet in one matrix of scores.

Legend: L tokens of one micro-batch, K guesses, H hidden size of the draft, A = layers * the target's, D head
size, R channels of it that turn, Hq heads, Vd draft vocabulary. State (k, i), of guess k in slot i, is row
k * L + i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig

from judge.dense_reference import (
    Frozen,
    LossRules,
    MicroBatch,
    StepResult,
    Weights,
    after_attention,
    before_attention,
    document_of,
    normed_aux,
    read_ahead,
    reference_step,
    rms_norm,
    rotary_frequencies,
)


def peagle_step(
    weights: Weights,
    config: LlamaConfig,
    frozen: Frozen,
    batches: Sequence[MicroBatch],
    rules: LossRules,
    rounding: float = 0.0,
) -> StepResult:
    """Loss, accuracies and gradients of one optimizer step; `rules.ttt_steps` is K.

    Args:
        weights: those of an EAGLE-3 draft, `mask_embedding` [H] and `mask_hidden` [A]; all computations are
            in their dtype.
        config: the draft's, with `mask_token_id`.
        batches: the whole micro-batches of all draft_dp ranks.
        rounding: logits that differ by less than this share of the largest count as ties.
    """
    return reference_step(weights, config, frozen, batches, rules, rounding, peagle_guesses)


def peagle_guesses(
    weights: Weights, config: LlamaConfig, frozen: Frozen, batch: MicroBatch, guesses: int
) -> list[Tensor]:
    """Draft logits [L, Vd] of each guess, in every slot."""
    document = document_of(batch)
    length = len(document)
    index = torch.arange(length)
    first = torch.tensor([int((document < d).sum()) for d in document])
    number = torch.arange(guesses).repeat_interleave(length)
    position = (index - first).repeat(guesses) + number
    angle = (position[:, None] * rotary_frequencies(config)).to(weights["fc.weight"].dtype)
    embeds, hidden = _fed(weights, config, frozen, batch, document, guesses)
    may_attend = visible_keys(document, guesses, getattr(config, "sliding_window", None))
    for layer in range(config.num_hidden_layers):
        q, k, v = before_attention(weights, config, layer, embeds, hidden, angle)
        attended = _attention(q, k, v, may_attend).transpose(0, 1).flatten(1)
        hidden = after_attention(weights, config, layer, hidden, attended)
    logits = rms_norm(hidden, weights["norm.weight"], config) @ weights["lm_head.weight"].T
    return list(logits.split(length))


def visible_keys(document: Tensor, guesses: int, window: int | None = None) -> Tensor:
    """Which states (rows) see the keys of which states (columns), bool [K * L, K * L].

    Args:
        document: of each slot, int64 [L].
        window: the most positions that a state looks back, its own included; None for no limit.
    """
    length = len(document)
    slot = torch.arange(length).repeat(guesses)
    number = torch.arange(guesses).repeat_interleave(length)
    of, at = slot[:, None], slot[None, :]
    context = (number[None, :] == 0) & (at <= of) & (document[at] == document[of])
    chain = (at == of) & (number[None, :] <= number[:, None])
    # A state stands at slot + guess, and so does its key.
    near = (of + number[:, None]) - (at + number[None, :]) < (window or length + guesses)
    return (context | chain) & near


def _fed(
    weights: Weights,
    config: LlamaConfig,
    frozen: Frozen,
    batch: MicroBatch,
    document: Tensor,
    guesses: int,
) -> tuple[Tensor, Tensor]:
    """The embedding and the hidden state that each state of the first layer gets, [K * L, H] each."""
    dtype = weights["fc.weight"].dtype
    read, inside = read_ahead(document, 1)
    tokens = batch.token_ids[read]
    mask_embedding = weights["mask_embedding"]
    # The mask token's row of the embedding is the learned one, wherever it is read. A document's last slot
    # has no next token: it reads zeros, and is not supervised.
    is_mask = (tokens == config.mask_token_id)[:, None]
    embeds = torch.where(is_mask, mask_embedding, frozen.embedding.to(dtype)[tokens]) * inside[:, None]
    rows = torch.cat((batch.aux.to(dtype), weights["mask_hidden"][None]))
    projected = normed_aux(weights, config, rows) @ weights["fc.weight"].T
    masks = (guesses - 1) * len(document)
    return (
        torch.cat((embeds, mask_embedding.expand(masks, -1))),
        torch.cat((projected[:-1], projected[-1].expand(masks, -1))),
    )


def _attention(q: Tensor, k: Tensor, v: Tensor, may_attend: Tensor) -> Tensor:
    """Attention over the keys that `may_attend` [n, n] allows: q [Hq, n, D], k and v [Hkv, n, D] ->
    [Hq, n, D].
    """
    group = len(q) // len(k)
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~may_attend, -math.inf)
    return scores.softmax(-1) @ v
