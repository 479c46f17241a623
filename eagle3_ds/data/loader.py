"""Which packed sequence goes where: pure functions of (seed, step, dp rank), the same for all peers of one sp
group.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

import datasets
import numpy as np
import torch
from torch import Tensor

from eagle3_ds.data.documents import document_lengths
from eagle3_ds.data.packing import pack
from eagle3_ds.layout import Anchors, PackedSequence, Rows


class HiddenStates(Protocol):
    """Where hidden states come from: the store on disk, or the target itself."""

    def require_documents(self, lengths: Mapping[int, int]) -> None:
        """Raises ValueError unless there are hidden states for every document of `lengths` ({document_id:
        tokens}).
        """

    def states(
        self, documents: Sequence[int], token_ids: Tensor, loss_mask: Tensor, lengths: Sequence[int]
    ) -> tuple[Tensor, Rows, Rows]:
        """`teacher_token`, `aux` and `teacher` of `PackedSequence` for these documents end to end.

        token_ids: int64 [L]. loss_mask: bool [L], which decides who will read what.
        """

    def announce(self, packs: Iterator[Sequence[tuple[int, Sequence[int]]]]) -> None:
        """Say what training will ask for, in order: packs of (document id, token ids), without end."""

    def close(self) -> None:
        """End what runs in the background. Not collective."""


class SequenceSource:
    """Makes packed sequences from rows of the documents and their hidden states.

    Raises ValueError when the store lacks a document or has it with another length.
    """

    def __init__(self, dataset: datasets.Dataset, store: HiddenStates) -> None:
        lengths = document_lengths(dataset)
        store.require_documents(lengths)
        self.dataset = dataset.with_format("numpy")
        self.store = store
        self.lengths = list(lengths.values())

    def sequence(
        self,
        rows: Sequence[int],
        supervised: bool = True,
        anchors: Callable[[Sequence[int], Sequence[int], Tensor], Tensor] | None = None,
    ) -> PackedSequence:
        """The documents in these rows of the data set, end to end; with `supervised` false none of their
        tokens counts. `anchors` chooses slots, from document ids, lengths and loss mask.

        Stored hidden states stay on disk until they are sliced; those of a target that runs now are computed
        here, by all ranks together.
        """
        documents = [self.dataset[row] for row in rows]
        ids = [int(document["document_id"]) for document in documents]
        token_ids = torch.from_numpy(
            np.concatenate([document["input_ids"] for document in documents]).astype(np.int64)
        )
        lengths = tuple(self.lengths[row] for row in rows)
        loss_mask = (
            torch.from_numpy(np.concatenate([document["loss_mask"] for document in documents]).astype(bool))
            & supervised
        )
        teacher_token, aux, teacher = self.store.states(ids, token_ids, loss_mask, lengths)
        return PackedSequence(
            token_ids=token_ids,
            loss_mask=loss_mask,
            lengths=lengths,
            teacher_token=teacher_token,
            aux=aux,
            teacher=teacher,
            anchors=None if anchors is None else anchors(ids, lengths, loss_mask),
        )


class PackedLoader:
    """Packs of at most `max_length` tokens for one draft_dp rank.

    The packs are laid out as one endless row, epoch after epoch, each epoch in an order of its own. Optimizer
    step s takes the next `accumulation * draft_dp` packs of it, and dp rank r every draft_dp-th of these.
    When the packs of an epoch do not fill its last step, that step goes on with the next epoch's first packs:
    nothing is lost, nothing is padded. So what a rank sees depends on (seed, step, dp_rank, draft_dp,
    accumulation) only, and resuming at a step needs no state. A run that is resumed with another
    `accumulation * draft_dp` says with `resumed` that step `resumed[0]` starts at place `resumed[1]` of the
    row; nothing is lost or seen twice then either.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        store: HiddenStates,
        max_length: int,
        draft_dp: int = 1,
        dp_rank: int = 0,
        accumulation: int = 1,
        seed: int = 0,
        resumed: tuple[int, int] = (0, 0),
        anchors: Anchors | None = None,
    ) -> None:
        assert 0 <= dp_rank < draft_dp and accumulation >= 1
        if not len(dataset):
            raise ValueError(
                "the data set has no document to pack: name files that hold conversations in data.train"
            )
        self.source = SequenceSource(dataset, store)
        self.packs = pack(self.source.lengths, max_length, seed)
        self.draft_dp = draft_dp
        self.dp_rank = dp_rank
        self.accumulation = accumulation
        self.seed = seed
        self.resumed = resumed
        self.anchors = anchors
        self._announced = False

    @property
    def num_packs(self) -> int:
        """Packs of one epoch, over all ranks."""
        return len(self.packs)

    def packs_before(self, step: int) -> int:
        """The place in the row at which optimizer step `step` (from 0) starts, for all dp ranks together."""
        first_step, first_pack = self.resumed
        return first_pack + (step - first_step) * self.accumulation * self.draft_dp

    def steps_in(self, epochs: int) -> int:
        """Optimizer steps after which every pack has been seen at least `epochs` times."""
        first_step, first_pack = self.resumed
        return first_step - (first_pack - epochs * self.num_packs) // (self.accumulation * self.draft_dp)

    def pack_indices(self, step: int) -> list[int]:
        """The packs that optimizer step `step` (from 0) gives to this rank, `accumulation` of them."""
        return [index for _, index in self._visits(step)]

    def step(self, step: int) -> list[PackedSequence]:
        """The `accumulation` packed sequences of optimizer step `step` (from 0) for this dp rank."""
        if not self._announced:
            self._announced = True
            self.source.store.announce(self._following(step))
        return [self._sequence(self.packs[index], epoch) for epoch, index in self._visits(step)]

    def first_pack(self) -> PackedSequence:
        """The first pack of this dp rank's step 0, not announced: `step` gives it again."""
        (epoch, index), *_ = self._visits(0)
        return self._sequence(self.packs[index], epoch)

    def _following(self, step: int) -> Iterator[Sequence[tuple[int, Sequence[int]]]]:
        """The packs of this dp rank from `step` on, as (document id, token ids)."""
        for later in itertools.count(step):
            for index in self.pack_indices(later):
                rows = [self.source.dataset[row] for row in self.packs[index]]
                yield [(int(row["document_id"]), row["input_ids"].tolist()) for row in rows]

    def documents(self, step: int) -> list[int]:
        """The ids of the documents in `step(step)`, in their order."""
        numbers = self.source.dataset.select_columns(["document_id"])
        numbers = numbers[[row for _, row in self._rows(step)]]["document_id"]
        return [int(number) for number in numbers]

    def document(self, step: int, place: int) -> PackedSequence:
        """The document at `place` in `documents(step)`, as a pack of its own."""
        epoch, row = self._rows(step)[place]
        return self._sequence([row], epoch)

    def _rows(self, step: int) -> list[tuple[int, int]]:
        """Epoch and row of each document in `step(step)`."""
        return [(epoch, row) for epoch, index in self._visits(step) for row in self.packs[index]]

    def _sequence(self, rows: Sequence[int], epoch: int) -> PackedSequence:
        chosen = None if self.anchors is None else partial(self.anchors, epoch)
        return self.source.sequence(rows, anchors=chosen)

    def _visits(self, step: int) -> list[tuple[int, int]]:
        """Epoch and pack of each micro-batch that optimizer step `step` (from 0) gives to this rank."""
        first = self.packs_before(step) + self.dp_rank
        places = [divmod(first + turn * self.draft_dp, self.num_packs) for turn in range(self.accumulation)]
        orders = {epoch: self._order(epoch) for epoch in {epoch for epoch, _ in places}}
        return [(epoch, orders[epoch][place]) for epoch, place in places]

    def _order(self, epoch: int) -> list[int]:
        order = list(range(self.num_packs))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order


class HeldoutPacks(Sequence[PackedSequence]):
    """Every pack once over all dp ranks, for evaluation: this rank's packs in order, made when they are asked
    for.

    All ranks have equally many, because a rank that stopped early would leave the others waiting in a
    collective. A rank that has none left repeats the first pack without supervision: it takes part in
    everything and adds nothing.
    """

    def __init__(self, loader: PackedLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return (self.loader.num_packs + self.loader.draft_dp - 1) // self.loader.draft_dp

    def __getitem__(self, turn: int) -> PackedSequence:  # type: ignore[override]
        """The pack of one turn; all ranks of the world ask for the same turn."""
        loader = self.loader
        if turn >= len(self):
            raise IndexError(turn)
        index = turn * loader.draft_dp + loader.dp_rank
        if index < loader.num_packs:
            return loader.source.sequence(loader.packs[index])
        return loader.source.sequence(loader.packs[0], supervised=False)
