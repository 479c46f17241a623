"""From a packed sequence to what one rank holds of it.

Shapes: L real tokens, S slots of this rank, the first Q of them live, E rows of its extended buffers (own
slots plus halo), K TTT steps, Ht hidden size of the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        aux: rows [L, 3 * Ht], the concatenated inputs of the three auxiliary target layers.
        teacher: rows [L, Ht], the target's last hidden state after its final norm.
    """

    token_ids: Tensor
    loss_mask: Tensor
    lengths: tuple[int, ...]
    teacher_token: Tensor
    aux: Rows
    teacher: Rows


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
        aux: rows [S, 3 * Ht], own slots only, unread.
        teacher: rows [E, Ht], unread; only those that live slots read at some step may be.
        max_position: largest position of the whole pack, the same on all sp ranks.
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
    max_position: int
    num_own_slots: int

    @property
    def live_row(self) -> Tensor:
        """`row` of the live slots, int64 [Q]."""
        return self.row[: self.plan.live_per_rank]


def prepare_usp_input(
    pack: PackedSequence,
    plan: SpanPlan,
    ring_rank: int,
    ulysses_rank: int,
    ttt_steps: int,
    mask_alignment: str = "served",
) -> LocalBatch:
    """Cut this rank's batch out of a packed sequence, reading only its own rows and their halo.

    Slot i at step k reads row i + 1 + k, so the halo is `ttt_steps` rows. Whatever leaves the document is
    never supervised.

    Raises:
        ValueError: the pack's columns or the plan disagree about the length.
    """
    length = plan.length
    for name in ("token_ids", "loss_mask", "teacher_token"):
        if len(getattr(pack, name)) != length:
            raise ValueError(
                f"{name} has {len(getattr(pack, name))} rows, but the documents of the pack have {length}."
            )
    rules = (pack.loss_mask.numpy(), ttt_steps, mask_alignment)
    assert not _supervised(plan.document, plan.rest[ring_rank, ulysses_rank], *rules).any(), (
        "a slot in the loss is not live"
    )
    slots = plan.slots(ring_rank, ulysses_rank)
    extended = plan.halo_slots(ring_rank, ulysses_rank, ttt_steps)
    return LocalBatch(
        plan=plan,
        ring_rank=ring_rank,
        ulysses_rank=ulysses_rank,
        position=torch.from_numpy(plan.position[slots]),
        row=torch.from_numpy(np.searchsorted(extended, slots)),
        supervised=torch.from_numpy(_supervised(plan.document, plan.live[ring_rank, ulysses_rank], *rules)),
        token_ids=LocalRows(pack.token_ids, extended, length)[:],
        teacher_token=LocalRows(pack.teacher_token, extended, length)[:],
        aux=LocalRows(pack.aux, slots, length),
        teacher=LocalRows(pack.teacher, extended, length),
        max_position=max(plan.lengths) - 1,
        num_own_slots=int((slots < length).sum()),
    )


def live_slots(
    lengths: Sequence[int], loss_mask: Tensor, ttt_steps: int, mask_alignment: str = "served"
) -> NDArray[np.bool_]:
    """bool [L]: the slots that count at some TTT step, and so all whose hidden states are wanted.
    `loss_mask`: bool [L].
    """
    document = np.repeat(np.arange(len(lengths)), lengths)
    supervised = _supervised(document, np.arange(len(document)), loss_mask.numpy(), ttt_steps, mask_alignment)
    return np.logical_or.reduce(supervised)


def _supervised(
    document: IntArray, slots: IntArray, loss_mask: NDArray[np.bool_], ttt_steps: int, alignment: str
) -> NDArray[np.bool_]:
    """bool [K, len(slots)]: slot i counts at step k when slot i + 1 + k is in its document and the aligned
    mask is set.

    `document`: of each slot of the sequence, -1 for padding.
    """
    beyond = np.concatenate((document, np.full(ttt_steps + 1, -1, dtype=np.int64)))
    mask = np.zeros(len(beyond), dtype=np.bool_)
    mask[: len(loss_mask)] = loss_mask
    read = slots[None, :] + 1 + np.arange(ttt_steps)[:, None]
    masked = mask[read if alignment == "served" else read - 1]
    return masked & (beyond[read] == document[slots]) & (document[slots] >= 0)
