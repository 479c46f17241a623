"""From a packed sequence to what one rank holds of it.

Shapes: L real tokens, S slots of this rank, the first Q of them live, E rows of its extended buffers (own
slots plus halo), K TTT steps, Ht hidden size of the target.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """Documents laid end to end, whole.

    Attributes:
        token_ids: int64 [L], `x_i`.
        loss_mask: bool [L], true for assistant tokens.
        lengths: document lengths, sum L.
        teacher_token: int64 [L], the target's argmax over its full vocabulary at each position (it predicts
            `x_{i+1}`).
        aux: rows [L, A], the concatenated inputs of the captured target layers, A = layers * Ht.
        teacher: rows [L, Ht], the target's last hidden state after its final norm.
    """

    token_ids: Tensor
    loss_mask: Tensor
    lengths: tuple[int, ...]
    teacher_token: Tensor
    aux: Rows
    teacher: Rows


class Supervision(Protocol):
    """Which slots count at each of the K guesses that a draft algorithm makes in a slot.

    Guess k of slot i is about token i + 2 + k: the draft has seen token i + 1 + k, and the teacher that
    predicts the guessed one stands in row i + 1 + k. A pure function of documents and mask, the same on every
    rank.
    """

    @property
    def num_guesses(self) -> int:
        """K."""

    @property
    def halo(self) -> int:
        """Rows beyond its own spans that a rank reads of tokens and teacher."""

    def __call__(
        self, document: IntArray, slots: IntArray, loss_mask: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Whether each of `slots` counts, at each guess.

        Args:
            document: int64, of each slot of the padded sequence, -1 for padding.
            slots: int64 [n], positions in the sequence.
            loss_mask: bool [L], true for assistant tokens; padding has no entry.

        Returns:
            bool [K, n].
        """


@dataclass(frozen=True)
class LocalBatch:
    """One rank's share of one packed sequence, on the host. The extended buffers are read at `row + 1 + k`.

    Attributes:
        position: int64 [S], position in the document; 0 for padding.
        row: int64 [S], this slot's row in the extended buffers.
        supervised: bool [K, Q], slots that count at each TTT step, the teacher's token in or out of the draft
            vocabulary.
        token_ids: int64 [E].
        teacher_token: int64 [E].
        aux: rows [S, A], own slots only, unread.
        teacher: rows [E, Ht], unread; only those that live slots read at some step may be.
        num_own_slots: slots of this rank that hold a token, without padding.
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
    num_own_slots: int

    @property
    def live_row(self) -> Tensor:
        """`row` of the live slots, int64 [Q]."""
        return self.row[: self.plan.live_per_rank]


def prepare_usp_input(
    pack: PackedSequence, plan: SpanPlan, ring_rank: int, ulysses_rank: int, supervision: Supervision
) -> LocalBatch:
    """Cut this rank's batch out of a packed sequence, reading only its own rows and their halo.

    Guess k of slot i reads row i + 1 + k of the constants. Whatever leaves the document is never supervised.

    Args:
        supervision: the draft algorithm's rule.

    Raises:
        ValueError: the pack's columns or the plan disagree about the length.
    """
    length = plan.length
    for name in ("token_ids", "loss_mask", "teacher_token"):
        if len(getattr(pack, name)) != length:
            raise ValueError(
                f"{name} has {len(getattr(pack, name))} rows, but the documents of the pack have {length}."
            )
    mask = pack.loss_mask.numpy()
    rest = supervision(plan.document, plan.rest[ring_rank, ulysses_rank], mask)
    assert not rest.any(), "a slot in the loss is not live"
    slots = plan.slots(ring_rank, ulysses_rank)
    extended = plan.halo_slots(ring_rank, ulysses_rank, supervision.halo)
    supervised = supervision(plan.document, plan.live[ring_rank, ulysses_rank], mask)
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
        num_own_slots=int((slots < length).sum()),
    )


def live_slots(lengths: Sequence[int], loss_mask: Tensor, supervision: Supervision) -> NDArray[np.bool_]:
    """bool [L]: the slots that count at some guess, and so all whose hidden states are wanted. `loss_mask`:
    bool [L].
    """
    document = np.repeat(np.arange(len(lengths)), lengths)
    return np.logical_or.reduce(supervision(document, np.arange(len(document)), loss_mask.numpy()))
