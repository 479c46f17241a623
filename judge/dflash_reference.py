"""The dense reference of DFlash, blocks of guesses drafted from anchors, with whose results the product must
agree.

It was written from docs/dflash.md alone. What is there as in docs/semantics.md (loss, accuracies, norms,
rotary embedding) is taken from judge/dense_reference.py; which slots are anchors, what their blocks are fed
and which keys they see is here. All blocks and all context of a pack meet in one matrix of scores.

Legend: L tokens of one micro-batch, A anchors, B inputs of a block, K = B - 1 guesses, H hidden size of the
draft, D head size, R channels of it that turn, Hq / Hkv heads, Vd draft vocabulary. Input (n, b), input b of
anchor n's block, is row n * B + b.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig

from judge.dense_reference import (
    Frozen,
    LossRules,
    MicroBatch,
    StepResult,
    Weights,
    document_of,
    is_supervised,
    read_ahead,
    reference_step,
    rms_norm,
    rotary_factor,
    rotary_frequencies,
    rotate,
)

LARGEST = 2**64


def dflash_step(
    weights: Weights,
    config: LlamaConfig,
    frozen: Frozen,
    batches: Sequence[MicroBatch],
    rules: LossRules,
    rounding: float = 0.0,
) -> StepResult:
    """Loss, accuracies and gradients of one optimizer step; `rules.ttt_steps` is K.

    Args:
        weights: whole, by the names of docs/dflash.md; all computations are in their dtype.
        config: the draft's, with `block_size`, `mask_token_id` and `block_causal`.
        batches: the whole micro-batches of all draft_dp ranks, each with its anchors.
        rounding: logits that differ by less than this share of the largest count as ties.

    Raises:
        ValueError: the rules have another number of guesses than a block, a window does not hold a block, or
            a batch does not say which slots are anchors.
    """
    if rules.ttt_steps != config.block_size - 1:
        raise ValueError(
            f"ttt_steps = {rules.ttt_steps}, but a block of {config.block_size} guesses one less."
        )
    window = getattr(config, "sliding_window", None)
    if window and window < config.block_size:
        raise ValueError(f"sliding_window = {window} does not hold a block of {config.block_size}.")
    if any(batch.anchors is None for batch in batches):
        raise ValueError("a micro-batch has no anchors; `sampled_anchors` chooses them.")
    return reference_step(weights, config, frozen, batches, rules, rounding, block_guesses)


def block_guesses(
    weights: Weights, config: LlamaConfig, frozen: Frozen, batch: MicroBatch, guesses: int
) -> list[Tensor]:
    """Draft logits [L, Vd] of each guess; zeros in slots that are no anchors."""
    assert batch.anchors is not None
    slots = batch.anchors.nonzero()[:, 0]
    logits = block_logits(weights, config, frozen, batch, slots)
    whole = logits.new_zeros(len(batch.token_ids), logits.shape[-1])
    return [whole.index_put((slots,), logits[:, 1 + k]) for k in range(guesses)]


def block_logits(
    weights: Weights, config: LlamaConfig, frozen: Frozen, batch: MicroBatch, slots: Tensor
) -> Tensor:
    """Logits [A, B, Vd] of the blocks of anchors, int64 [A]. Those of input 0 mean nothing."""
    dtype, size = weights["fc.weight"].dtype, config.block_size
    document = document_of(batch)
    first = torch.tensor([int((document < d).sum()) for d in document])
    position = torch.arange(len(document)) - first
    context = rms_norm(batch.aux.to(dtype) @ weights["fc.weight"].T, weights["hidden_norm.weight"], config)
    tokens = torch.full((len(slots), size), config.mask_token_id)
    newest, inside = read_ahead(document, 1)
    # An anchor at its document's end knows a token that is not there; no guess of it counts.
    tokens[:, 0] = torch.where(inside, batch.token_ids[newest], config.mask_token_id)[slots]
    hidden = _embedded(weights, config, frozen, tokens.flatten())
    at = (position[slots, None] + 1 + torch.arange(size)).flatten()
    seen = _seen(config, document, position, slots, at)
    for layer in range(config.num_hidden_layers):
        hidden = _layer(weights, config, layer, hidden, context, (at, position), seen)
    normed = rms_norm(hidden, weights["norm.weight"], config)
    return (normed @ weights["lm_head.weight"].T).unflatten(0, (len(slots), size))


def sampled_anchors(
    batch: MicroBatch, rules: LossRules, share: float, seed: int, visit: int, documents: Sequence[int]
) -> Tensor:
    """bool [L]: the anchors of a pack; `documents` are the rows of its documents in the data set."""
    candidates = is_supervised(replace(batch, anchors=None), rules.alignment, 0)
    anchors = torch.zeros_like(candidates)
    start = 0
    for row, length in zip(documents, batch.lengths, strict=True):
        base = _mixed(_mixed(_mixed(seed) ^ visit) ^ row)
        places = candidates[start : start + length].nonzero()[:, 0].tolist()
        ranked = sorted((_mixed(base ^ place), place) for place in places)
        chosen = ranked[: math.ceil(share * len(places))]
        anchors[[start + place for _, place in chosen]] = True
        start += length
    return anchors


def _mixed(x: int) -> int:
    """SplitMix64 of a whole number below 2**64."""
    x = (x + 0x9E3779B97F4A7C15) % LARGEST
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % LARGEST
    x = (x ^ x >> 27) * 0x94D049BB133111EB % LARGEST
    return x ^ x >> 31


def _embedded(weights: Weights, config: LlamaConfig, frozen: Frozen, tokens: Tensor) -> Tensor:
    """Embeddings [n, H] of tokens [n]; the draft's own of the mask token, if it has one."""
    rows = frozen.embedding.to(weights["fc.weight"].dtype)[tokens]
    if "mask_embedding" not in weights:
        return rows
    return torch.where((tokens == config.mask_token_id)[:, None], weights["mask_embedding"], rows)


def _seen(config: LlamaConfig, document: Tensor, position: Tensor, slots: Tensor, at: Tensor) -> Tensor:
    """bool [A * B, L + A * B]: which context, and which inputs of blocks, each input of a block sees.

    Args:
        document, position: of each slot, [L]; slots: the anchors, [A]; at: positions of inputs, [A * B].
    """
    size = config.block_size
    anchor = slots.repeat_interleave(size)
    index, block = torch.arange(len(document)), torch.arange(len(at)) // size
    context = (document[anchor, None] == document) & (index <= anchor[:, None])
    inside = block[:, None] == block
    if config.block_causal:
        inside &= at <= at[:, None]
    window = getattr(config, "sliding_window", None)
    if window:
        context &= at[:, None] - position < window
    return torch.cat((context, inside), dim=1)


def _layer(
    weights: Weights,
    config: LlamaConfig,
    layer: int,
    hidden: Tensor,
    context: Tensor,
    positions: tuple[Tensor, Tensor],
    seen: Tensor,
) -> Tensor:
    """One layer: hidden [A * B, H], context [L, H], positions of both, seen [A * B, L + A * B] ->
    [A * B, H].
    """

    def weight(name: str) -> Tensor:
        return weights[f"layers.{layer}.{name}.weight"]

    def heads(x: Tensor, name: str) -> Tensor:
        projected = x @ weight(f"self_attn.{name}_proj").T
        # The number of heads is written out: a pack without an anchor has no row to infer it from.
        heads = projected.shape[1] // config.head_dim
        return projected.unflatten(1, (heads, config.head_dim)).transpose(0, 1)

    at, of_context = ((p[:, None].double() * rotary_frequencies(config)).to(hidden.dtype) for p in positions)
    x = rms_norm(hidden, weight("input_layernorm"), config)
    q = rotate(rms_norm(heads(x, "q"), weight("self_attn.q_norm"), config), at, rotary_factor(config))
    keyed = rms_norm(heads(torch.cat((context, x)), "k"), weight("self_attn.k_norm"), config)
    k = rotate(keyed, torch.cat((of_context, at)), rotary_factor(config))
    v = heads(torch.cat((context, x)), "v")
    group = config.num_attention_heads // config.num_key_value_heads
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = (q @ k.transpose(1, 2) * config.head_dim**-0.5).masked_fill(~seen, -math.inf)
    attended = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
    hidden = hidden + attended @ weight("self_attn.o_proj").T
    normed = rms_norm(hidden, weight("post_attention_layernorm"), config)
    gate, up = (normed @ weight(f"mlp.{name}_proj").T for name in ("gate", "up"))
    return hidden + (functional.silu(gate) * up) @ weight("mlp.down_proj").T
