"""A DFlash draft as a server runs it: one block of the newest token and masks, all guesses at once.

Verified slots enter the cache as context. A block's keys and values lie behind them for the time of the block
alone: the next context overwrites them.

Legend: S new slots, A entries of a slot's captured hidden states, R texts, B inputs of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from eagle3_ds.algorithms.dflash.model import DFlashModel
from eagle3_ds.draft.geometry import aux_size
from eagle3_ds.draft.served import DraftBatchCache
from eagle3_ds.draft.vocabulary import VocabularyMap

PROBE_SLOTS = 12


class DFlashBatchGuesser:
    """The draft with the cache of several texts, a `draft.contract.BatchGuesser`.

    Args:
        draft: the weights.
        embedding: [V, H], the target's, or the draft's own.
        vocabulary: translates draft ids to target ids.
        num_texts: texts are numbered from 0.
    """

    def __init__(
        self, draft: DFlashModel, embedding: Tensor, vocabulary: VocabularyMap, num_texts: int
    ) -> None:
        self._draft, self._embedding = draft, embedding
        self._to_target = vocabulary.draft_to_target.to(embedding.device)
        self._cache = DraftBatchCache(draft.config.num_hidden_layers, num_texts)

    @torch.no_grad()
    def propose(
        self, aux: Mapping[int, Tensor], tokens: Mapping[int, Sequence[int]], count: int
    ) -> dict[int, list[int]]:
        """As `BatchGuesser.propose`.

        Raises:
            ValueError: a block makes another number of guesses than `count`.
        """
        check_count(self._draft, count)
        texts, device = list(tokens), self._embedding.device
        states = torch.cat([aux[text] for text in texts])
        self._draft.take(
            states, self._cache.open(texts, [len(tokens[t]) for t in texts], states.device), self._cache
        )
        verified = list(self._cache.lengths)
        block = torch.full((len(texts), count + 1), self._draft.config.mask_token_id, device=device)
        block[:, 0] = torch.tensor([tokens[text][-1] for text in texts], device=device)
        positions = self._cache.open(texts, [count + 1] * len(texts), device)
        embeds = self._draft.embed(block.flatten(), self._embedding)
        hidden = self._draft.decode(embeds, positions, self._cache).unflatten(0, block.shape)
        self._cache.lengths = verified
        guesses = self._to_target[self._draft.logits(hidden[:, 1:]).argmax(dim=-1)]
        return dict(zip(texts, guesses.tolist(), strict=True))


class DFlashGuesser:
    """The draft in the middle of one text, a `draft.contract.Guesser`: a batch of one."""

    def __init__(self, draft: DFlashModel, embedding: Tensor, vocabulary: VocabularyMap) -> None:
        self._batch = DFlashBatchGuesser(draft, embedding, vocabulary, 1)

    def propose(self, aux: Tensor, tokens: Sequence[int], count: int) -> list[int]:
        """As `Guesser.propose`. Raises ValueError as `DFlashBatchGuesser.propose`."""
        return self._batch.propose({0: aux}, {0: tokens}, count)[0]


def check_count(draft: DFlashModel, count: int) -> None:
    """Raises ValueError when a block of this draft makes another number of guesses than `count`."""
    size, causal = draft.config.block_size, draft.config.block_causal
    if count == size - 1 or (causal and 0 < count < size):
        return
    rule = (
        f"it makes 1 to {size - 1} guesses"
        if causal
        else f"it makes {size - 1} guesses, all or none, because each input of the block sees all masks of it"
    )
    raise ValueError(
        f"{count} guesses are asked of a draft whose block_size is {size}: {rule}. Ask for {size - 1} (in a "
        "recipe eval.draft_tokens)."
    )


@torch.no_grad()
def probe_logits(draft: DFlashModel, seed: int) -> Tensor:
    """Logits [B, Vd] of one block after PROBE_SLOTS slots of context, for an input drawn from `seed`, and the
    draft's own mask embedding if it has one. See `DraftAlgorithm.probe`.
    """
    config, cache = draft.config, DraftBatchCache(draft.config.num_hidden_layers, 1)
    generator, size, cpu = torch.Generator().manual_seed(seed), config.block_size, torch.device("cpu")
    newest, mask = torch.randn(2, config.hidden_size, generator=generator)
    aux = torch.randn(PROBE_SLOTS, aux_size(config), generator=generator)
    draft.take(aux, cache.open([0], [PROBE_SLOTS], cpu), cache)
    mask = draft.mask_embedding if config.mask_embedding else mask.to(draft.fc.weight.dtype)
    embeds = torch.stack([newest.to(mask.dtype), *[mask] * (size - 1)])
    return draft.logits(draft.decode(embeds, cache.open([0], [size], cpu), cache))
