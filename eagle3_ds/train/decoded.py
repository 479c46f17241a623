"""Decoding held-out prompts with the draft as it is, between two steps of training.

Rank 0 decodes alone, by real speculative decoding with the whole target: no other place of a run has one (a
store has hidden states alone, an online target is cut over the ranks). Between two decodings its target waits
in the memory of rank 0's host, and its device holds it only while nothing of a step is there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from eagle3_ds.checkpoint.rng import random_states, restore_random_states
from eagle3_ds.collectives.agreement import sum_over_ranks
from eagle3_ds.draft import has_own_embedding, load_draft_embedding
from eagle3_ds.targets import Target, load_target
from eagle3_ds.train.trainer import DraftTrainer

logger = logging.getLogger(__name__)


class DecodedAcceptance:
    """Measures the acceptance length of a trainer's draft on the same prompts again and again.

    Args:
        trainer: whose weights are read, and never changed.
        prompts: on rank 0; the other ranks do not look at theirs.
    """

    def __init__(self, trainer: DraftTrainer, prompts: Sequence[Sequence[int]]) -> None:
        self._trainer, self._prompts = trainer, prompts
        self._target: Target | None = None

    def measure(self) -> float | None:
        """Tokens per forward of the target, its own included; None when every answer ended before the draft
        was asked. Collective: all ranks gather the weights, then they wait for rank 0. Random states are
        afterwards as before, so that a run goes on as without it.
        """
        topology = self._trainer.topology
        is_first = topology.place.rank == 0
        weights = self._trainer.state_dict(keep=is_first)
        counts = [0, 0]
        if is_first:
            with _kept_random_states(topology.device):
                counts = self._decode(weights)
        emitted, rounds = sum_over_ranks(counts, topology.device)
        return emitted / rounds if rounds else None

    def _decode(self, weights: dict[str, Tensor]) -> list[int]:
        """Emitted tokens and rounds over all prompts. On rank 0 alone."""
        # Not above: the room draws pictures too, and a rank that decodes nothing needs none of it.
        from eagle3_ds.eval.decoded import decoded_rounds

        started = time.perf_counter()
        recipe, device = self._trainer.recipe, self._trainer.topology.device
        if self._target is None:
            self._target = load_target(recipe.target)
        draft = self._trainer.algorithm.build(self._trainer.draft.config)
        draft.load_state_dict(weights)
        try:
            self._target.model.to(device)
            # A new object: the other's head, where it is a tensor of its own, is not moved with the model.
            target = replace(self._target)
            embedding = self._embedding()
            rounds = decoded_rounds(recipe, target, draft, embedding, self._trainer.vocabulary, self._prompts)
        finally:
            self._target.model.to("cpu")
        counts = [sum(each.emitted for each in rounds), len(rounds)]
        took = time.perf_counter() - started
        words = "decoded %d held-out prompts in %.1f s: %d tokens in %d rounds"
        logger.info(words, len(self._prompts), took, *counts)
        return counts

    def _embedding(self) -> Tensor | None:
        config = self._trainer.draft.config
        if not has_own_embedding(config):
            return None
        return load_draft_embedding(self._trainer.recipe.output_dir, (config.vocab_size, config.hidden_size))


@contextmanager
def _kept_random_states(device: torch.device) -> Iterator[None]:
    """What is drawn in the block, or loaded with a draw, leaves no trace in this rank's generators."""
    states = random_states(device)
    try:
        yield
    finally:
        restore_random_states(states, device)
