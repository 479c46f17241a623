"""Weights with which a small Llama finds what it saw before it has learnt anything.

Of the tokens that a benchmark has time for, a model of a few million parameters learns words from random
weights, but not to look back: its loss does not fall with context. So its first two layers begin with the
circuit that trained models are known to have (an "induction head"). Nothing is frozen.

- Embeddings hold the token in one part of the hidden state and a constant, the same for all, in another.
- Layer 0: three heads look at the tokens 1, 2 and 3 places before, which they find by place alone: the
  constant is their query and key, and the rotation of positions does the rest. Each writes what it saw into a
  part of its own.
- Layer 1: two heads compare the last three tokens with the three before every other place, all three at once
  and the newest with most weight, and write the token at the best place into a part that the language head
  reads. They compare in the rotation's slowest pairs, which hardly turn within the longest context: so it
  does not matter how far back a place is.

All else is random and small.

Legend: H hidden size, D head dimension, M dimensions of a token's part, N of a part that layer 0 writes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INITIAL_STD = 0.02
"""Of the random weights. Wider ones drown what the first layers write."""
OUTWARD_SHARE = 0.4
"""Of that, what is left of the random projections that write into the hidden state."""
TOKEN_NORM, CONSTANT_NORM, SEEN_NORM, HEAD_NORM = 0.9, 0.45, 0.8, 1.1
"""Norms of a token and of the constant in an embedding, of a token that a head of layer 0 writes, and of
a row of the language head."""
WRITTEN_GAIN = 0.15
"""Of a head of layer 1, from the normalised token to the output's part."""
BEFORE = 3
"""Tokens that are compared."""
PLACE_LOGIT = 10.0
"""By how much, at least, the place a head of layer 0 looks at is preferred over the ones beside it."""
MATCH_LOGIT = 22.0
"""Of three tokens that are all the same."""
MATCH_WEIGHTS = ((1.0, 0.8, 0.6), (1.0, 0.5, 0.25))
"""Of the last tokens, newest first, in the comparison of each of two heads."""
SLOWEST_SHARE = 3 / 8
"""Of a head's rotated pairs, those that compare tokens: at 16,384 places the fastest turns by less than a
radian where rope_theta is 10 million."""


@dataclass(frozen=True)
class _Parts:
    """Directions of the hidden state, orthogonal to each other: fp32 [H], [M, H], three of [N, H], [M, H]."""

    constant: Tensor
    token: Tensor
    seen: tuple[Tensor, ...]
    output: Tensor


@torch.no_grad()
def wire_lookup(model: Any, seed: int) -> None:
    """Give an untrained Llama (LlamaForCausalLM, fp32) these weights, in place.

    Raises:
        ValueError: too few layers, heads or channels for it, or tied embeddings.
    """
    config = model.config
    layers, heads, groups = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
    if layers < 2 or groups < 2 or heads < 4 or config.hidden_size < 64 or config.tie_word_embeddings:
        raise ValueError(
            "a look-up takes num_layers >= 2, num_heads >= 4, num_kv_heads >= 2, hidden_size >= 64 and "
            f"untied embeddings, not {layers}, {heads}, {groups}, {config.hidden_size} and "
            f"tie_word_embeddings {config.tie_word_embeddings}. Choose other sizes."
        )
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, INITIAL_STD, generator=rng)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(OUTWARD_SHARE)
        layer.mlp.down_proj.weight.mul_(OUTWARD_SHARE)
    parts = _parts(config.hidden_size, config.head_dim, rng)
    tokens = torch.randn(config.vocab_size, len(parts.token), generator=rng)
    tokens /= tokens.norm(dim=1, keepdim=True)
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    embedding.mul_(0.25).add_(TOKEN_NORM * tokens @ parts.token + CONSTANT_NORM * parts.constant)
    head.mul_(0.25).add_(HEAD_NORM * tokens @ parts.output)
    _look_at_tokens_before(model.model.layers[0].self_attn, config, parts)
    _look_for_the_same_tokens(model.model.layers[1].self_attn, config, parts, rng)


def _parts(hidden: int, head_dim: int, rng: torch.Generator) -> _Parts:
    rows = _rotation(hidden, rng)
    of_token = hidden // 4
    of_seen = min(head_dim, of_token, (hidden - 1 - 2 * of_token) // BEFORE)
    sizes = [1, of_token, *[of_seen] * BEFORE, of_token]
    constant, token, *seen, output = rows[: sum(sizes)].split(sizes)
    return _Parts(constant[0], token, tuple(seen), output)


def _rotation(size: int, rng: torch.Generator) -> Tensor:
    """A random orthogonal matrix: fp32 [size, size]."""
    return torch.linalg.qr(torch.randn(size, size, generator=rng))[0]


def _frequencies(config: Any) -> Tensor:
    """Radians per place of each rotated pair (channels i and i + D / 2): fp32 [D / 2], fastest first."""
    pairs = config.head_dim // 2
    return float(config.rope_parameters["rope_theta"]) ** (-torch.arange(pairs) / pairs)


def _look_at_tokens_before(attention: Any, config: Any, parts: _Parts) -> None:
    """Head number i of the first three looks i + 1 places back and writes the token there into part i."""
    width, share = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    turn = _frequencies(config)
    # The fast pairs tell a place from the ones beside it; the slower ones tell it from the far ones at which
    # the fast pairs have turned by whole rounds. The slowest tell nothing.
    weights = torch.where(turn > 0.25, 2.0, 1.0) * (turn > 1e-4)
    root = math.sqrt(config.hidden_size)
    # A normalised embedding's share of the constant, squared, times the least fall of the sum of cosines.
    constant = root * CONSTANT_NORM / math.hypot(TOKEN_NORM, CONSTANT_NORM)
    fall = float((weights**2 * (1 - turn.cos())).sum())
    gain = math.sqrt(PLACE_LOGIT * math.sqrt(width) / fall) / constant
    token = root * TOKEN_NORM / math.hypot(TOKEN_NORM, CONSTANT_NORM)
    for head in range(BEFORE):
        group, seen = head // share, parts.seen[head]
        ahead = turn * (head + 1)
        # A query turned back by so many places meets the key that stands there.
        query = torch.cat([weights * ahead.cos(), -weights * ahead.sin()])
        key = torch.cat([weights, torch.zeros_like(weights)])
        query_rows, group_rows = (slice(i * width, (i + 1) * width) for i in (head, group))
        attention.q_proj.weight[query_rows] = gain * torch.outer(query, parts.constant)
        attention.k_proj.weight[group_rows] = gain * torch.outer(key, parts.constant)
        count = len(seen)
        attention.v_proj.weight[group_rows][:count] = parts.token[:count]
        written = SEEN_NORM / (token * math.sqrt(count / len(parts.token)))
        attention.o_proj.weight[:, query_rows][:, :count] = written * seen.T


def _look_for_the_same_tokens(attention: Any, config: Any, parts: _Parts, rng: torch.Generator) -> None:
    """The first query head of each of two key heads compares the last tokens with those before a place."""
    width, share = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    pairs = width // 2
    slow = torch.arange(pairs - max(1, round(SLOWEST_SHARE * pairs)), pairs)
    channels = torch.cat([slow, slow + pairs])
    count = len(parts.seen[0])
    # What stands before the query is in the same parts as what stands before the key, one place further.
    last = (parts.token[:count], *parts.seen)
    norm = math.sqrt(TOKEN_NORM**2 + CONSTANT_NORM**2 + BEFORE * SEEN_NORM**2)
    per_channel = math.sqrt(config.hidden_size) * SEEN_NORM / norm / math.sqrt(count)
    for group, weights in enumerate(MATCH_WEIGHTS):
        head_rows, group_rows = (slice(i * width, (i + 1) * width) for i in (group * share, group))
        same = len(channels) * per_channel**2 * sum(weight**2 for weight in weights)
        gain = math.sqrt(MATCH_LOGIT * math.sqrt(width) / same)
        query, key = torch.zeros(2, width, config.hidden_size)
        for place, weight in enumerate(weights):
            mixing = torch.randn(len(channels), count, generator=rng) / math.sqrt(count)
            query[channels] += gain * weight * mixing @ last[place]
            key[channels] += gain * weight * mixing @ last[place + 1]
        attention.q_proj.weight[head_rows], attention.k_proj.weight[group_rows] = query, key
        rows = min(width, len(parts.token))
        attention.v_proj.weight[group_rows][:rows] = parts.token[:rows]
        attention.o_proj.weight[:, head_rows][:, :rows] = WRITTEN_GAIN * parts.output[:rows].T
