"""Hidden states of a target that runs beside the draft: one forward per packed sequence, nothing on disk.

Every rank runs the target over the very slots that it trains on, so that only the halo of the teacher and its
tokens travel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.collectives import all_gather_rows
from eagle3_ds.layout import Rows
from eagle3_ds.train.row_exchange import IntArray, RowExchange
from eagle3_ds.train.spans import plan_spans
from eagle3_ds.train.target_engine import TargetEngine


class OnlineStates:
    """Takes the place of a hidden-state store. `states` is collective over the world, as the target's forward
    is.
    """

    def __init__(self, engine: TargetEngine) -> None:
        self.engine = engine

    def require_documents(self, lengths: Mapping[int, int]) -> None:
        """Any document will do: its hidden states are computed when it is trained on."""

    def states(
        self, documents: Sequence[int], token_ids: Tensor, loss_mask: Tensor, lengths: Sequence[int]
    ) -> tuple[Tensor, Rows, Rows]:
        """`teacher_token` whole, `aux` for this rank's slots, `teacher` where live slots read it; all in host
        memory.
        """
        topology, recipe = self.engine.topology, self.engine.recipe
        halo = algorithm_of(recipe).supervision(recipe).halo
        states = self.engine.run(token_ids, lengths, plan_spans(recipe, lengths, loss_mask))
        plan = states.plan
        own = states.slots[states.slots < plan.length]
        wanted = [
            plan.teacher_slots(ring, ulysses, halo)
            for ring in range(plan.ring)
            for ulysses in range(plan.ulysses)
        ]
        teacher = RowExchange(plan, wanted, topology.sp_rank, topology.sp_group)(states.teacher)
        tokens = all_gather_rows(states.teacher_token, topology.sp_group).cpu()[
            plan.sequence_order[: plan.length]
        ]
        return (
            tokens,
            HeldRows(own, states.aux[: len(own)].cpu()),
            HeldRows(wanted[topology.sp_rank], teacher.cpu()),
        )


class HeldRows:
    """Rows of a packed sequence, asked for by their place in it; this rank holds those of `slots`."""

    def __init__(self, slots: IntArray, rows: Tensor) -> None:
        assert len(slots) == len(rows), (len(slots), len(rows))
        order = np.argsort(slots)
        self._slots, self._rows = slots[order], rows[torch.from_numpy(order)]

    def __getitem__(self, rows: slice) -> Tensor:
        first = int(np.searchsorted(self._slots, rows.start))
        held = slice(first, first + rows.stop - rows.start)
        assert np.array_equal(self._slots[held], np.arange(rows.start, rows.stop)), (
            f"rows {rows} are not all on this rank"
        )
        return self._rows[held]
