"""Rows that one sp rank computed, handed to the sp ranks that want them: one all-to-all, planned from the
span plan alone.

Legend: S slots of this rank, L padded length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from eagle3_ds.layout import SpanPlan

IntArray = NDArray[np.int64]


class RowExchange:
    """Who sends which rows to whom. Every sp rank builds it from the same `plan` and `wanted`.

    Args:
        wanted: for each sp rank the slots that it wants, ascending and below the padded length; several ranks
            may want one.
        sp_group: the ranks that share the sequence, in the order of sp_rank; None for one rank.
    """

    def __init__(
        self, plan: SpanPlan, wanted: Sequence[IntArray], sp_rank: int, sp_group: dist.ProcessGroup | None
    ) -> None:
        assert len(wanted) == plan.ring * plan.ulysses, (len(wanted), plan.ring, plan.ulysses)
        self.group = sp_group
        holder, row = _holders(plan)
        held = [slots[holder[slots] == sp_rank] for slots in wanted]
        self.rows = torch.from_numpy(row[np.concatenate(held)])
        self.send_sizes = [len(slots) for slots in held]
        mine = wanted[sp_rank]
        self.receive_sizes = np.bincount(holder[mine], minlength=len(wanted)).tolist()
        # Rows arrive by sender, ascending within one: a stable sort by sender tells where each belongs.
        self.arrival = torch.from_numpy(np.argsort(np.argsort(holder[mine], kind="stable"), kind="stable"))

    def __call__(self, x: Tensor) -> Tensor:
        """x [S, ...], this rank's slots -> the wanted slots' rows, in their order. Collective over the sp
        group.
        """
        sent = x[self.rows.to(x.device)]
        if self.group is None:
            return sent
        received = x.new_empty((sum(self.receive_sizes), *x.shape[1:]))
        dist.all_to_all_single(received, sent, self.receive_sizes, self.send_sizes, group=self.group)
        return received[self.arrival.to(x.device)]


def _holders(plan: SpanPlan) -> tuple[IntArray, IntArray]:
    """The sp rank that holds each slot, and the slot's row there. [L] each."""
    by_rank = plan.ring_slots.reshape(plan.ring * plan.ulysses, plan.slots_per_rank)
    holder, row = np.empty(plan.padded_length, np.int64), np.empty(plan.padded_length, np.int64)
    holder[by_rank] = np.arange(len(by_rank))[:, None]
    row[by_rank] = np.arange(plan.slots_per_rank)
    return holder, row
