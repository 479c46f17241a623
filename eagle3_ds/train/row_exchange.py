"""Sending rows from the sp ranks that computed them to the sp ranks that want them, in one all-to-all.

Every rank derives all message sizes from the span plan, so that no sizes are exchanged.

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
    """Which rows each sp rank sends to which other one. Every sp rank builds it from the same `plan` and
    `wanted`; building is not collective.

    Args:
        wanted: for each sp rank, the slots that it wants: int64, ascending, below the padded length. Several
            ranks may want the same slot.
        sp_rank: this rank's.
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
        # Rows arrive ordered by sender, and ascending from each sender. The inverse of a stable sort by
        # sender puts them in the order of `wanted`.
        self.arrival = torch.from_numpy(np.argsort(np.argsort(holder[mine], kind="stable"), kind="stable"))

    def __call__(self, x: Tensor) -> Tensor:
        """Exchange rows. Collective over the sp group.

        Args:
            x: [S, ...], the rows of this rank's slots, in the order of the plan.

        Returns:
            [n, ...], the rows of the n slots that this rank wants, in the order of `wanted`.
        """
        sent = x[self.rows.to(x.device)]
        if self.group is None:
            return sent
        received = x.new_empty((sum(self.receive_sizes), *x.shape[1:]))
        dist.all_to_all_single(received, sent, self.receive_sizes, self.send_sizes, group=self.group)
        return received[self.arrival.to(x.device)]


def _holders(plan: SpanPlan) -> tuple[IntArray, IntArray]:
    """For every slot, the sp rank that holds it and the slot's row on that rank: int64 [L] each."""
    by_rank = plan.ring_slots.reshape(plan.ring * plan.ulysses, plan.slots_per_rank)
    holder, row = np.empty(plan.padded_length, np.int64), np.empty(plan.padded_length, np.int64)
    holder[by_rank] = np.arange(len(by_rank))[:, None]
    row[by_rank] = np.arange(plan.slots_per_rank)
    return holder, row
