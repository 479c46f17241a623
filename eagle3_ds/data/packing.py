"""Which documents share one packed sequence: best-fit decreasing, as a pure function of the lengths."""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence


def pack(lengths: Sequence[int], max_length: int, seed: int) -> list[list[int]]:
    """Cover documents 0..n-1 of `lengths` tokens by bins of at most `max_length` tokens, every document
    exactly once.

    Best-fit decreasing: the longest document first, each into the fullest bin that still takes it. The seed
    decides which of several equally long documents goes first and the order within a bin, so that bins do not
    follow the order of the files. Raises ValueError for a length outside [1, max_length].
    """
    for document, length in enumerate(lengths):
        if not 1 <= length <= max_length:
            raise ValueError(
                f"document {document} has {length} tokens and a packed sequence takes 1 to {max_length}: "
                "raise data.max_length or set data.on_too_long to drop or truncate"
            )
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    order.sort(key=lambda document: -lengths[document])
    bins: list[list[int]] = []
    room: list[
        tuple[int, int]
    ] = []  # (free tokens, bin), sorted: the first entry with enough room is the tightest fit
    for document in order:
        length = lengths[document]
        slot = bisect.bisect_left(room, (length, -1))
        if slot < len(room):
            free, chosen = room.pop(slot)
        else:
            free, chosen = max_length, len(bins)
            bins.append([])
        bins[chosen].append(document)
        bisect.insort(room, (free - length, chosen))
    for documents in bins:
        rng.shuffle(documents)
    return bins


def fill(lengths: Sequence[int], max_length: int, bins: Sequence[Sequence[int]]) -> float:
    """Share of the bins' slots that hold a token, in [0, 1]; 0 without bins."""
    return sum(lengths) / (len(bins) * max_length) if bins else 0.0
