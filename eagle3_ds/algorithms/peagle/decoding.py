"""The draft as a server runs it: verified slots and masks go through it together, in one pass.

Behind the last verified slot, slot i, follow the masks of positions i + 1 .. i + K - 1. The pass is causal,
so each sees the verified slots and the masks before it. The guesses are the K outputs from slot i on; then
the masks' keys and values are dropped.

Legend: S new slots, A entries of a slot's captured hidden states, H hidden size, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from eagle3_ds.algorithms.eagle3.decoding import PROBE_SLOTS, Eagle3BatchGuesser
from eagle3_ds.algorithms.peagle.model import PEagleModel
from eagle3_ds.draft.geometry import aux_size
from eagle3_ds.draft.served import DraftCache
from eagle3_ds.draft.vocabulary import VocabularyMap

PROBE_MASKS = 3


class PEagleBatchGuesser(Eagle3BatchGuesser):
    """The draft with the cache of several texts, a `draft.contract.BatchGuesser`. The arguments are those of
    `Eagle3Guesser`, and the number of texts.
    """

    _draft: PEagleModel

    @torch.no_grad()
    def propose(
        self, aux: Mapping[int, Tensor], tokens: Mapping[int, Sequence[int]], count: int
    ) -> dict[int, list[int]]:
        """As `BatchGuesser.propose`."""
        texts, rest = list(tokens), self._last_pieces(aux, tokens)
        embeds, hidden = masks(self._draft, count - 1)
        fed_embeds, fed_hidden, counts = list[Tensor](), list[Tensor](), list[int]()
        for states, ids in rest.values():
            fed_embeds += [self._embed(ids), embeds]
            fed_hidden += [self._draft.project_aux(states.to(embeds.dtype)), hidden]
            counts.append(len(ids) + count - 1)
        before = list(self._cache.lengths)
        positions = self._cache.open(texts, counts, hidden.device)
        output = self._draft.decode(torch.cat(fed_embeds), torch.cat(fed_hidden), positions, self._cache)
        for text, (_, ids) in rest.items():
            before[text] += len(ids)
        self._cache.lengths = before
        guessed = torch.cat([part[-count:] for part in output.split(counts)])
        guesses = self._guess(guessed).view(len(texts), count).tolist()
        return dict(zip(texts, guesses, strict=True))

    def _embed(self, ids: Tensor) -> Tensor:
        is_mask = (ids == self._draft.config.mask_token_id)[:, None]
        return torch.where(is_mask, self._draft.mask_embedding, super()._embed(ids))


class PEagleGuesser:
    """The draft with the cache of one text, a `draft.contract.Guesser`: a batch of one.

    Args:
        draft: the weights.
        embedding: [V, H], the target's.
        vocabulary: translates draft ids to target ids.
    """

    def __init__(self, draft: PEagleModel, embedding: Tensor, vocabulary: VocabularyMap) -> None:
        self._batch = PEagleBatchGuesser(draft, embedding, vocabulary, 1)

    def propose(self, aux: Tensor, tokens: Sequence[int], count: int) -> list[int]:
        """As `Guesser.propose`: aux [S, A], S tokens, one place later -> `count` ids of the target."""
        return self._batch.propose({0: aux}, {0: tokens}, count)[0]


def masks(draft: PEagleModel, count: int) -> tuple[Tensor, Tensor]:
    """What the first layer is fed for `count` masks: embeddings and hidden states, [count, H] each."""
    hidden = draft.project_aux(draft.mask_hidden[None])
    return draft.mask_embedding.expand(count, -1), hidden.expand(count, -1)


@torch.no_grad()
def probe_logits(draft: PEagleModel, seed: int) -> Tensor:
    """Logits [PROBE_SLOTS + PROBE_MASKS, Vd] of slots with masks behind them, for an input drawn from `seed`.
    See `DraftAlgorithm.probe`.
    """
    config, cache = draft.config, DraftCache(draft.config.num_hidden_layers)
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(PROBE_SLOTS, config.hidden_size, generator=generator)
    aux = torch.randn(PROBE_SLOTS, aux_size(config), generator=generator)
    mask_embeds, mask_hidden = masks(draft, PROBE_MASKS)
    positions = torch.arange(PROBE_SLOTS + PROBE_MASKS)
    hidden = torch.cat((draft.project_aux(aux), mask_hidden))
    return draft.logits(draft.decode(torch.cat((embeds, mask_embeds)), hidden, positions, cache))
