"""Whether a text goes round in circles: a target that repeats itself is easy to guess and worth nothing."""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 4
SHORTEST = 16
"""Tokens from which on a text is judged: shorter ones repeat themselves by chance."""
LOOPING_SHARE = 0.5
"""Share of repeated n-grams from which on a text loops. Prose has below 0.1 of them, code and tables up to
0.4."""


def repeated_share(tokens: Sequence[int]) -> float:
    """Share of the n-grams of four tokens that stood in the text before; 0.0 for a text without any."""
    ngrams = [tuple(tokens[start : start + NGRAM]) for start in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def loops(tokens: Sequence[int]) -> bool:
    """Whether at least half of the text's n-grams are repetitions. Texts below 16 tokens are not judged."""
    return len(tokens) >= SHORTEST and repeated_share(tokens) >= LOOPING_SHARE
