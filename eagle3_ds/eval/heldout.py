"""Which held-out prompts are decoded, after training and during it."""

from __future__ import annotations

import logging
import random

import numpy as np

from eagle3_ds.config import Recipe
from eagle3_ds.data import PreparedData

logger = logging.getLogger(__name__)


def heldout_prompts(data: PreparedData, longest: int, number: int | None, seed: int) -> list[list[int]]:
    """Up to `number` prompts (None: all) of at most `longest` tokens: held-out conversations up to the
    beginning of an assistant's turn. Every such turn is a candidate, so contexts are short and long; the seed
    chooses.
    """
    prompts = []
    for row in data.heldout.with_format("numpy"):
        mask = row["loss_mask"].astype(bool)
        # The first token of each assistant's turn.
        turns = np.flatnonzero(mask & ~np.concatenate(([False], mask[:-1])))
        prompts += [row["input_ids"][:turn].tolist() for turn in turns if 0 < turn <= longest]
    random.Random(seed).shuffle(prompts)
    return prompts[:number]


def longest_prompt(recipe: Recipe, max_positions: int) -> int:
    """Tokens of the longest prompt after which the target can still answer."""
    return max_positions - recipe.eval.max_new_tokens - recipe.eval.draft_tokens


def prompts_during(recipe: Recipe, data: PreparedData, max_positions: int) -> list[list[int]]:
    """The prompts that are decoded during training: the first `eval.during_prompts` in the order in which the
    evaluation after training takes them, but for those beyond `eval.during_max_context`, which are passed
    over and told of.

    Raises:
        ValueError: none is short enough.
    """
    settings = recipe.eval
    prompts = heldout_prompts(data, longest_prompt(recipe, max_positions), None, recipe.data.seed)
    fitting = [prompt for prompt in prompts if len(prompt) <= settings.during_max_context]
    if not fitting:
        raise ValueError(
            f"eval.during is {settings.during}, and of {len(prompts)} held-out prompts none has at most "
            f"eval.during_max_context = {settings.during_max_context} tokens (the shortest has "
            f"{min(map(len, prompts), default=0)}). Raise it, hold out more data, or set eval.during to 0."
        )
    chosen = fitting[: settings.during_prompts]
    lengths = [len(prompt) for prompt in chosen]
    logger.info(
        "eval.during: %d held-out prompts of %d to %d tokens are decoded every %d steps; %d of %d are longer "
        "than eval.during_max_context (%d) and passed over",
        len(chosen),
        min(lengths),
        max(lengths),
        settings.during,
        len(prompts) - len(fitting),
        len(prompts),
        settings.during_max_context,
    )
    return chosen
