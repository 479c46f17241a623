"""The draft as a server runs it: a chain of guesses, each made from the one before.

Guess k is made in the slot k places after the last verified one. Its input is the draft's own output and
guess k - 1, at the next rotary position. After the target has verified the guesses, the guessed slots are
dropped from the cache, and the verified ones enter it with the target's hidden states.

Legend: S new slots, A entries of a slot's captured hidden states, H hidden size, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from eagle3_ds.algorithms.eagle3.model import DraftModel
from eagle3_ds.draft.geometry import aux_size
from eagle3_ds.draft.served import DraftBatchCache, DraftCache
from eagle3_ds.draft.vocabulary import VocabularyMap

PROBE_SLOTS = 12
PIECE = 512
"""Slots of a text that are taken in at once, so that a long prompt's attention mask stays small."""


class Eagle3Guesser:
    """The draft with its cache, a `draft.contract.Guesser`.

    Args:
        draft: the weights.
        embedding: [V, H], the target's.
        vocabulary: translates draft ids to target ids.
    """

    def __init__(self, draft: DraftModel, embedding: Tensor, vocabulary: VocabularyMap) -> None:
        self._draft, self._embedding = draft, embedding
        self._to_target = vocabulary.draft_to_target.to(embedding.device)
        self._cache = DraftCache(draft.config.num_hidden_layers)

    @torch.no_grad()
    def propose(self, aux: Tensor, tokens: Sequence[int], count: int) -> list[int]:
        """As `Guesser.propose`: aux [S, A], S tokens, one place later -> `count` ids of the target."""
        verified = len(self._cache) + len(tokens)
        for start in range(0, len(tokens), PIECE):
            piece = slice(start, start + PIECE)
            positions = len(self._cache) + torch.arange(len(tokens[piece]), device=aux.device)
            hidden = self._draft.project_aux(aux[piece].to(self._draft.fc.weight.dtype))
            hidden = self._draft.decode(self._embed(tokens[piece]), hidden, positions, self._cache)[-1:]
        guesses: list[int] = []
        while True:
            guesses.append(int(self._to_target[self._draft.logits(hidden)[0].argmax()]))
            if len(guesses) == count:
                break
            position = positions[-1:] + len(guesses)
            read = self._draft.passed_on(hidden)
            hidden = self._draft.decode(self._embed(guesses[-1:]), read, position, self._cache)
        self._cache.truncate(verified)
        return guesses

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        ids = torch.tensor(list(tokens), device=self._embedding.device)
        return functional.embedding(ids, self._embedding).to(self._draft.fc.weight.dtype)


class Eagle3BatchGuesser:
    """The draft with the cache of several texts, a `draft.contract.BatchGuesser`. The arguments are those of
    `Eagle3Guesser`, and the number of texts.
    """

    def __init__(
        self, draft: DraftModel, embedding: Tensor, vocabulary: VocabularyMap, num_texts: int
    ) -> None:
        self._draft, self._embedding = draft, embedding
        self._to_target = vocabulary.draft_to_target.to(embedding.device)
        self._cache = DraftBatchCache(draft.config.num_hidden_layers, num_texts)

    @torch.no_grad()
    def propose(
        self, aux: Mapping[int, Tensor], tokens: Mapping[int, Sequence[int]], count: int
    ) -> dict[int, list[int]]:
        """As `BatchGuesser.propose`."""
        texts, rest = list(tokens), self._last_pieces(aux, tokens)
        counts = [len(ids) for _, ids in rest.values()]
        states, ids = (torch.cat(parts) for parts in zip(*rest.values(), strict=True))
        hidden = self._take(texts, states, ids, counts)
        hidden = hidden[torch.tensor(counts, device=hidden.device).cumsum(0) - 1]
        verified = list(self._cache.lengths)
        guesses = [self._guess(hidden)]
        while len(guesses) < count:
            positions = self._cache.open(texts, [1] * len(texts), hidden.device)
            hidden = self._draft.passed_on(hidden)
            hidden = self._draft.decode(self._embed(guesses[-1]), hidden, positions, self._cache)
            guesses.append(self._guess(hidden))
        self._cache.lengths = verified
        return dict(zip(texts, torch.stack(guesses, dim=1).tolist(), strict=True))

    def _last_pieces(
        self, aux: Mapping[int, Tensor], tokens: Mapping[int, Sequence[int]]
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Take in the texts' new slots but for the last PIECE at most of each; returns those, by text: states
        [s, A] and ids int64 [s].
        """
        rest = dict[int, tuple[Tensor, Tensor]]()
        for text in tokens:
            states, ids = aux[text], torch.tensor(list(tokens[text]), device=self._embedding.device)
            while len(ids) > PIECE:
                self._take([text], states[:PIECE], ids[:PIECE], [PIECE])
                states, ids = states[PIECE:], ids[PIECE:]
            rest[text] = (states, ids)
        return rest

    def _take(self, texts: list[int], states: Tensor, ids: Tensor, counts: list[int]) -> Tensor:
        """The draft's output at verified slots: states [S, A], ids int64 [S] -> [S, H]."""
        positions = self._cache.open(texts, counts, states.device)
        hidden = self._draft.project_aux(states.to(self._draft.fc.weight.dtype))
        return self._draft.decode(self._embed(ids), hidden, positions, self._cache)

    def _guess(self, hidden: Tensor) -> Tensor:
        """The likeliest token of each slot, as ids of the target: hidden [R, H] -> int64 [R]."""
        return self._to_target[self._draft.logits(hidden).argmax(dim=-1)]

    def _embed(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self._embedding).to(self._draft.fc.weight.dtype)


@torch.no_grad()
def probe_logits(draft: DraftModel, seed: int) -> Tensor:
    """Logits [PROBE_SLOTS + 1, Vd] of a prefill of PROBE_SLOTS slots and of one guessed slot after it, for an
    input drawn from `seed`. See `DraftAlgorithm.probe`.
    """
    config, cache = draft.config, DraftCache(draft.config.num_hidden_layers)
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(PROBE_SLOTS + 1, config.hidden_size, generator=generator)
    aux = torch.randn(PROBE_SLOTS, aux_size(config), generator=generator)
    first = draft.decode(embeds[:PROBE_SLOTS], draft.project_aux(aux), torch.arange(PROBE_SLOTS), cache)
    second = draft.decode(
        embeds[PROBE_SLOTS:], draft.passed_on(first[-1:]), torch.tensor([PROBE_SLOTS]), cache
    )
    return draft.logits(torch.cat((first, second)))
