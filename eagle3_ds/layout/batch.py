"""From a packed sequence to one rank's share of it.

Legend: L real tokens, S slots of this rank, the first Q of them live, E rows of its extended buffers (its own
slots and their halo, ascending), K TTT steps, Ht hidden size of the target, A entries of a slot's captured
hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eagle3_ds.layout.plan import IntArray, SpanPlan
from eagle3_ds.layout.rows import LocalRows, Rows


@dataclass(frozen=True)
class PackedSequence:
    """Documents laid end to end, before they are cut over ranks.

    Attributes:
        token_ids: int64 [L], `x_i`.
        loss_mask: bool [L], true for assistant tokens.
        lengths: document lengths; their sum is L.
        teacher_token: int64 [L], the target's argmax over its full vocabulary at each position (it predicts
            `x_{i+1}`).
        aux: rows [L, A], the concatenated inputs of the captured target layers, A = layers * Ht.
        teacher: rows [L, Ht], the target's last hidden state after its final norm.
        anchors: bool [L], the slots that may enter the loss this time, chosen by the draft algorithm; None
            for all that its rule supervises.
    """

    token_ids: Tensor
    loss_mask: Tensor
    lengths: tuple[int, ...]
    teacher_token: Tensor
    aux: Rows
    teacher: Rows
    anchors: Tensor | None = None


Anchors = Callable[[int, Sequence[int], Sequence[int], Tensor], Tensor]
"""Chooses `PackedSequence.anchors`: from how often the documents were seen before (the epoch), their ids,
their lengths and the loss mask, bool [L] -> bool [L].
"""


class Supervision(Protocol):
    """The rule of a draft algorithm that says which slots enter the loss at which of the K guesses.

    Guess k of slot i is about token i + 2 + k. The draft has seen token i + 1 + k, and the teacher
    distribution to match is that of row i + 1 + k. The rule is a pure function of the documents and the mask,
    so every rank gets the same answer.
    """

    @property
    def num_guesses(self) -> int:
        """K: how many guesses a slot makes."""

    @property
    def halo(self) -> int:
        """How many rows after each of its spans a rank reads of tokens and teacher."""

    def __call__(
        self, document: IntArray, slots: IntArray, loss_mask: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Which of `slots` enter the loss at each guess.

        Args:
            document: int64 [padded length], the document of each slot, -1 for padding.
            slots: int64 [n], positions in the sequence.
            loss_mask: bool [L], true for assistant tokens; padding has no entry.

        Returns:
            bool [K, n], true where the slot is supervised.
        """

    def slots_of(self, num_own_slots: int, supervised: NDArray[np.bool_]) -> int:
        """What `loss.reduction: slots` counts of a rank that holds so many tokens, with its live slots
        supervised as bool [K, Q] says.
        """


@dataclass(frozen=True)
class LocalBatch:
    """One rank's share of one packed sequence, on the host.

    Token ids, teacher tokens and teacher rows are *extended buffers*: they cover this rank's slots and their
    halo. TTT step k of slot s reads them at `row[s] + 1 + k`.

    Attributes:
        plan, ring_rank, ulysses_rank: the cut of the sequence, and this rank's place in it.
        position: int64 [S], position in the document; 0 for padding.
        row: int64 [S], the slot's own row in the extended buffers.
        supervised: bool [K, Q], live slots that enter the loss at each TTT step, whether or not the teacher's
            token is in the draft vocabulary.
        token_ids: int64 [E].
        teacher_token: int64 [E], see `PackedSequence`.
        aux: rows [S, A], of the own slots only; not read yet.
        teacher: rows [E, Ht], not read yet; only rows that live slots read at some step are present.
        num_slots: what `loss.reduction: slots` counts of this rank.
    """

    plan: SpanPlan
    ring_rank: int
    ulysses_rank: int
    position: Tensor
    row: Tensor
    supervised: Tensor
    token_ids: Tensor
    teacher_token: Tensor
    aux: LocalRows
    teacher: LocalRows
    num_slots: int

    @property
    def live_row(self) -> Tensor:
        """`row` of the live slots, int64 [Q]."""
        return self.row[: self.plan.live_per_rank]


def prepare_usp_input(
    pack: PackedSequence, plan: SpanPlan, ring_rank: int, ulysses_rank: int, supervision: Supervision
) -> LocalBatch:
    """Cut this rank's batch out of a packed sequence, reading only its own rows and their halo.

    Args:
        pack: the whole sequence; its hidden states may be on disk.
        plan: the cut of the sequence.
        ring_rank, ulysses_rank: this rank's place in the plan.
        supervision: the draft algorithm's rule.

    Raises:
        ValueError: a column of the pack has another length than the plan.
    """
    length = plan.length
    for name in ("token_ids", "loss_mask", "teacher_token", "anchors"):
        column = getattr(pack, name)
        if column is not None and len(column) != length:
            raise ValueError(f"{name} has {len(column)} rows, but the documents of the pack have {length}.")
    mask = pack.loss_mask.numpy()
    chosen = np.ones(plan.padded_length, dtype=np.bool_)
    if pack.anchors is not None:
        chosen[:length] = pack.anchors.numpy()
    live, rest = (part[ring_rank, ulysses_rank] for part in (plan.live, plan.rest))
    assert not (supervision(plan.document, rest, mask) & chosen[rest]).any(), "a slot in the loss is not live"
    slots = plan.slots(ring_rank, ulysses_rank)
    extended = plan.halo_slots(ring_rank, ulysses_rank, supervision.halo)
    supervised = supervision(plan.document, live, mask) & chosen[live]
    return LocalBatch(
        plan=plan,
        ring_rank=ring_rank,
        ulysses_rank=ulysses_rank,
        position=torch.from_numpy(plan.position[slots]),
        row=torch.from_numpy(np.searchsorted(extended, slots)),
        supervised=torch.from_numpy(supervised),
        token_ids=LocalRows(pack.token_ids, extended, length)[:],
        teacher_token=LocalRows(pack.teacher_token, extended, length)[:],
        aux=LocalRows(pack.aux, slots, length),
        teacher=LocalRows(pack.teacher, extended, length),
        num_slots=supervision.slots_of(int((slots < length).sum()), supervised),
    )


def live_slots(
    lengths: Sequence[int], loss_mask: Tensor, supervision: Supervision, anchors: Tensor | None = None
) -> NDArray[np.bool_]:
    """The live slots of a packed sequence, bool [L]: those that enter the loss at one guess or more.

    Args:
        lengths: document lengths, their sum is L.
        loss_mask: bool [L], true for assistant tokens.
        supervision: the draft algorithm's rule.
        anchors: as in `PackedSequence`.
    """
    document = np.repeat(np.arange(len(lengths)), lengths)
    live = np.logical_or.reduce(supervision(document, np.arange(len(document)), loss_mask.numpy()))
    return live if anchors is None else live & anchors.numpy()
