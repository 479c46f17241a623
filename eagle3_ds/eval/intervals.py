"""How certain an acceptance length is, from how much it differs between prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eagle3_ds.eval.speculative import Round

SAMPLES, SEED = 2000, 0
PERCENTILES = (2.5, 97.5)
FEWEST = 2
"""Prompts with a round, below which nothing is known of the spread."""


def interval(of_prompts: Sequence[Sequence[Round]]) -> list[float] | None:
    """The 95% interval of the acceptance length, by a bootstrap over prompts: prompts are drawn with
    replacement, as many as there are, and emitted tokens are divided by rounds. Rounds of one prompt depend
    on each other, so they are drawn together.

    Returns:
        Its two ends, the same in every run; None below two prompts with a round.
    """
    return interval_of_counts(
        [sum(each.emitted for each in rounds) for rounds in of_prompts], list(map(len, of_prompts))
    )


def interval_of_counts(emitted: Sequence[int], rounds: Sequence[int]) -> list[float] | None:
    """The same interval from the emitted tokens and the rounds of each prompt."""
    counted = [(tokens, count) for tokens, count in zip(emitted, rounds, strict=True) if count]
    if len(counted) < FEWEST:
        return None
    tokens, number = np.array(counted).T
    drawn = np.random.default_rng(SEED).integers(len(counted), size=(SAMPLES, len(counted)))
    lengths = tokens[drawn].sum(axis=1) / number[drawn].sum(axis=1)
    return [float(end) for end in np.percentile(lengths, PERCENTILES)]
