"""Looking back, from the first step of a target's training on: weights that already find where the last two
tokens stood before, rows of random tokens that only such a look-up predicts, and the measure of it.

From random weights, a model of a few million parameters does not learn to look back within the hours that a
benchmark has. So the first layers begin with the circuit that trained models are known to have (an "induction
head"): layer 0 notes in every token which two stood before it, and the layers after it find the tokens that
stood behind the same two and pass them on to the output. Nothing is frozen; training may change all of it.

Legend: D hidden size, V vocabulary, T tokens of a row.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CODE, LAST, BEFORE, NEXT, ONE = slice(0, 96), slice(96, 144), slice(144, 184), slice(184, 248), 248
"""Dimensions of the hidden state: a token's own code; parts of the codes of the last token and of the one
before it; of the token that may come next; and a constant. 248 is the constant's index.
"""
HIDDEN, HEADS, KV_HEADS, HEAD = 256, 4, 2, 64
"""The one shape that this is laid out for."""
CONSTANT = 6.0
"""What stands at ONE in every embedding."""
FAST_PAIRS, SHARPNESS = 12, 8.0
"""Rotary pairs by which layer 0 finds the tokens before this one, and the size of queries and keys in them:
with the twelve fastest, one token further away costs over six nats.
"""
SLOW_PAIR, MATCH = 22, 2.3
"""The rotary pairs from this one on turn by two radians at most over 16,384 tokens at a theta of 500,000:
in them a code matches itself at any distance. And the gain of queries and keys.
"""
LOOKUP_LAYERS = (1, 2, 3)
"""Each compares codes by another random projection, so that what they agree on is no accident."""
OUTPUT_GAIN, NOISE = 0.2, 0.1
"""Of the output's weights for NEXT, and of the weights that belong to no part of the circuit."""
MIN_QUOTED, MAX_QUOTED = 8, 64
"""Tokens of a copied span."""
UNTOLD = 2
"""First tokens of a span that nothing before them tells: where it was copied from is not known yet."""


@torch.no_grad()
def wire_lookup(model: Any) -> None:
    """Give a Llama of random weights the look-up. Matrices are [outputs, inputs].

    Raises:
        ValueError: the model has another shape than the circuit is laid out for.
    """
    config = model.config
    shape = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads)
    if shape != (HIDDEN, HEADS, KV_HEADS) or config.num_hidden_layers <= max(LOOKUP_LAYERS):
        raise ValueError(
            f"a look-up is laid out for hidden_size, num_heads, num_kv_heads {(HIDDEN, HEADS, KV_HEADS)} and "
            f"more than {max(LOOKUP_LAYERS)} layers, not {shape} and {config.num_hidden_layers}."
        )
    embedding, head, layers = model.model.embed_tokens.weight, model.lm_head.weight, model.model.layers
    embedding.mul_(NOISE)
    embedding[:, CODE].normal_()
    embedding[:, ONE] = CONSTANT
    head.mul_(NOISE)
    head[:, NEXT] = OUTPUT_GAIN * embedding[:, : NEXT.stop - NEXT.start]
    for layer in layers:  # at first they add little to what the circuit says
        layer.self_attn.o_proj.weight.mul_(NOISE)
        layer.mlp.down_proj.weight.mul_(NOISE)
    _note_last_tokens(layers[0].self_attn, config.rope_parameters["rope_theta"])
    for number in LOOKUP_LAYERS:
        _look_up(layers[number].self_attn)


def _rms(*parts: slice) -> float:
    """Of a hidden state with codes in `parts` and the constant: its norm divides by this."""
    return math.sqrt((sum(part.stop - part.start for part in parts) + CONSTANT**2) / HIDDEN)


def _note_last_tokens(attention: Any, theta: float) -> None:
    """Head 0 attends to the last token and writes its code to LAST, head 1 to the one before, and BEFORE.

    Queries and keys are the same vector in every token, the query turned back by one token or two: so their
    product is largest where rotary positions differ by just that.
    """
    query, key, value, out = _matrices(attention)
    rms = _rms(CODE)
    size = SHARPNESS * rms / CONSTANT
    angles = theta ** (-torch.arange(FAST_PAIRS) * 2 / HEAD)
    key[:HEAD].mul_(NOISE)
    key[:FAST_PAIRS, ONE] = size
    value[:HEAD] = 0
    for back, part in ((1, LAST), (2, BEFORE)):
        first, width = (back - 1) * HEAD, part.stop - part.start
        query[first : first + HEAD].mul_(NOISE)
        query[first : first + FAST_PAIRS, ONE] = size * torch.cos(-back * angles)
        second = first + HEAD // 2  # a rotary pair is a dimension and the one half a head further
        query[second : second + FAST_PAIRS, ONE] = size * torch.sin(-back * angles)
        value[:width, :width] = rms * torch.eye(width)
        out[part] = 0
        out[part, first : first + width] = torch.eye(width)


def _look_up(attention: Any) -> None:
    """Every head attends to the tokens whose LAST is this token's code and whose BEFORE is this token's LAST,
    and writes their codes to NEXT.
    """
    query, key, value, out = _matrices(attention)
    rms = _rms(CODE, LAST, BEFORE)
    last, before, passed = (part.stop - part.start for part in (LAST, BEFORE, NEXT))
    slow = torch.cat([torch.arange(SLOW_PAIR, HEAD // 2), torch.arange(HEAD // 2 + SLOW_PAIR, HEAD)])
    query.mul_(NOISE)
    key.mul_(NOISE)
    value.zero_()
    out[NEXT] = 0
    for number in range(KV_HEADS):
        of_last = torch.randn(len(slow), last) * MATCH * rms / math.sqrt(last)
        of_before = torch.randn(len(slow), before) * MATCH * rms / math.sqrt(before)
        key[number * HEAD + slow, LAST] = of_last
        key[number * HEAD + slow, BEFORE] = of_before
        value[number * HEAD : number * HEAD + passed, :passed] = rms * torch.eye(passed)
        for reader in range(number * HEADS // KV_HEADS, (number + 1) * HEADS // KV_HEADS):
            query[reader * HEAD + slow, :last] = of_last
            query[reader * HEAD + slow, LAST.start : LAST.start + before] = of_before
            share = 1 / (HEADS * len(LOOKUP_LAYERS))
            out[NEXT, reader * HEAD : reader * HEAD + passed] = share * torch.eye(passed)


def _matrices(attention: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    query, key, value, out = (getattr(attention, name).weight for name in names)
    return query, key, value, out


def copied_row(number: int, length: int, vocab_size: int, first_token: int) -> tuple[list[int], list[int]]:
    """`length` + 1 tokens and 1 where a token is told by a look-up: random tokens, then spans copied from
    anywhere in them. How many are random, and how many different ones there are, differs from row to row.

    Args:
        number: the row depends on it and on the sizes alone.
        first_token: no token below it is used; special ones have the lowest ids.
    """
    rng = random.Random(f"copies {number} of {length}")
    fresh = _between(rng, min(MIN_QUOTED * 2, length // 2), length * 3 // 4)
    kinds = min(_between(rng, 32, vocab_size), vocab_size - first_token)
    ids = rng.choices(rng.sample(range(first_token, vocab_size), kinds), k=fresh)
    told = [0] * fresh
    while len(ids) <= length:
        start = rng.randrange(max(1, fresh - MIN_QUOTED))
        span = ids[start : min(fresh, start + rng.randint(MIN_QUOTED, MAX_QUOTED))]
        ids += span
        told += [0] * min(UNTOLD, len(span)) + [1] * (len(span) - UNTOLD)
    return ids[: length + 1], told[: length + 1]


def _between(rng: random.Random, low: int, high: int) -> int:
    """As often from a number to its double, whatever the number."""
    return int(math.exp(rng.uniform(math.log(low), math.log(high))))


@torch.no_grad()
def loss_of_copies(
    model: Any, first_token: int, distances: Sequence[int], count: int
) -> list[dict[str, float]]:
    """The loss in nats of random tokens and of a span of them that comes again, the first of its row: at each
    distance, over `count` rows.
    """
    found = []
    generator = torch.Generator().manual_seed(0)
    for distance in distances:
        first = second = 0.0
        span = min(MAX_QUOTED, distance) // 2
        for _ in range(count):
            ids = torch.randint(first_token, model.config.vocab_size, (1, distance), generator=generator)
            ids = torch.cat([ids, ids[:, :span]], 1)
            # The span alone is judged, so the logits of the others need no memory.
            hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[0]
            places = torch.cat([torch.arange(span - 1), torch.arange(distance + UNTOLD - 1, len(hidden))])
            losses = functional.cross_entropy(
                model.lm_head(hidden[places]).float(), ids[0, places + 1], reduction="none"
            )
            first += float(losses[: span - 1].mean()) / count
            second += float(losses[span - 1 :].mean()) / count
        found.append({"distance": distance, "first": first, "second": second})
    return found
