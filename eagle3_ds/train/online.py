"""Hidden states from an online target: one target forward per packed sequence, nothing on disk.

Each rank runs the target over the same slots that it trains on. So the ranks exchange only the teacher's halo
(the rows that follow a span, which its TTT steps are taught with) and the teacher's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.layout import Rows
from eagle3_ds.train.row_exchange import IntArray, RowExchange
from eagle3_ds.train.spans import plan_spans, whole_tokens
from eagle3_ds.train.target_engine import TargetEngine


class OnlineStates:
    """Has the methods of a hidden-state store, and computes what a store would read. `states` is collective
    over the world, because the target's forward is.
    """

    def __init__(self, engine: TargetEngine) -> None:
        self.engine = engine

    def close(self) -> None:
        """Nothing is running that must end."""

    def announce(self, packs: Iterator[Sequence[tuple[int, Sequence[int]]]]) -> None:
        """Nothing is fetched ahead."""

    def require_documents(self, lengths: Mapping[int, int]) -> None:
        """Accept any documents: their hidden states are computed when they are trained on."""

    def states(
        self, documents: Sequence[int], token_ids: Tensor, loss_mask: Tensor, lengths: Sequence[int]
    ) -> tuple[Tensor, Rows, Rows]:
        """Run the target over a packed sequence. Collective over the world.

        Args:
            documents: document ids; not used.
            token_ids: int64 [L], whole on every rank of the sp group.
            loss_mask: bool [L], whole on every rank of the sp group.
            lengths: the tokens of each document.

        Returns:
            In host memory: `teacher_token` int64 [L], whole; `aux`, this rank's slots of rows
            [L, layers * Ht]; `teacher`, those rows of [L, Ht] that this rank's live slots read.
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
        return (
            whole_tokens(states.teacher_token, plan, topology.sp_group),
            HeldRows(own, states.aux[: len(own)].cpu()),
            HeldRows(wanted[topology.sp_rank], teacher.cpu()),
        )


class HeldRows:
    """The rows of a packed sequence that this rank holds, indexed by their slots in the whole sequence.

    Args:
        slots: int64 [n], the slots held, in any order.
        rows: [n, width], their rows.
    """

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
