"""Rows of random tokens that only looking back predicts, and the measure of how far a model looks back."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

MIN_QUOTED, MAX_QUOTED = 8, 64
"""Tokens of a copied span."""
UNTOLD = 2
"""First tokens of a span that nothing before them tells: where it was copied from is not known yet."""


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
            ids = torch.cat([ids, ids[:, :span]], 1).to(model.device)
            # The span alone is judged, so the logits of the others need no memory.
            hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[0]
            places = torch.cat([torch.arange(span - 1), torch.arange(distance + UNTOLD - 1, len(hidden))])
            places = places.to(model.device)
            losses = functional.cross_entropy(
                model.lm_head(hidden[places]).float(), ids[0, places + 1], reduction="none"
            )
            first += float(losses[: span - 1].mean()) / count
            second += float(losses[span - 1 :].mean()) / count
        found.append({"distance": distance, "first": first, "second": second})
    return found
