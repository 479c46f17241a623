"""The rows of one rank, read from the files that a server wrote, one file for each document.

Both ways in which a server's rows are trained on use this: the stream of a run (`train.streamed`) and the
rollouts of an RL loop (`train.rollout`).

Legend: L tokens of a packed sequence, n rows, S hidden states of a row in a file, Ht hidden size of the
target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.config import Recipe
from eagle3_ds.layout import LocalRows, SpanPlan
from eagle3_ds.serving.rows import Expected, RowFile
from eagle3_ds.store import RowFormat
from eagle3_ds.store.rows import as_stored
from eagle3_ds.targets.end import TargetEnd
from eagle3_ds.topology import Topology
from eagle3_ds.train.online import HeldRows
from eagle3_ds.train.row_exchange import IntArray
from eagle3_ds.train.spans import plan_spans

ROWS_AT_ONCE = 8192
"""How many last hidden states are normed at a time, as where a store is filled."""


@dataclass(frozen=True)
class SpanRows:
    """This rank's rows of a packed sequence, by slots of the whole sequence, in host memory.

    Attributes:
        plan: how the sequence is cut.
        own: int64, this rank's slots that hold a token, in the order in which it holds them.
        read: int64, ascending: the slots of `own` and those that the teacher's rows are read of.
        aux: rows [len(own), layers * Ht] of the slots `own`.
        teacher: the rows that this rank's live slots read.
        token: int64, the target's token of each slot in `read`.
    """

    plan: SpanPlan
    own: IntArray
    read: IntArray
    aux: HeldRows
    teacher: HeldRows
    token: HeldRows


class SpanReader:
    """Reads from files the rows that this rank trains on, and no others.

    Args:
        expected: what the rows of the target look like.
        end: the target's final norm and head: a server gives its last hidden state before the norm.
        dtype: that rows are rounded to, as where they are stored.
    """

    def __init__(
        self, recipe: Recipe, topology: Topology, expected: Expected, end: TargetEnd, dtype: str
    ) -> None:
        aux_width = (len(expected.layer_ids) - 1) * expected.hidden_size
        self.recipe, self.topology, self.expected, self.end = recipe, topology, expected, end
        self.layout = RowFormat(aux_width, expected.hidden_size, dtype)

    def use_head(self, head: Tensor) -> None:
        """Use a copy of another head [V, Ht] of the target from now on."""
        old = self.end.head
        self.end = replace(self.end, head=head.to(old.device, old.dtype, copy=True))

    def read(self, files: Sequence[RowFile], lengths: Sequence[int], loss_mask: Tensor) -> SpanRows:
        """Read this rank's rows of the packed sequence. Not collective.

        Args:
            files: of its documents.
            lengths: the tokens of each document.
            loss_mask: bool [L], whole.

        Raises:
            ValueError: a row is damaged or not finite.
        """
        plan = plan_spans(self.recipe, lengths, loss_mask)
        place, halo = self.topology.place, algorithm_of(self.recipe).supervision(self.recipe).halo
        slots = plan.slots(place.ring_rank, place.ulysses_rank)
        own = slots[slots < plan.length]
        taught = plan.teacher_slots(place.ring_rank, place.ulysses_rank, halo)
        packed, ordered = _Packed(files, lengths), np.sort(own)
        read, layout = np.union1d(ordered, taught), self.layout
        aux = torch.empty(len(own), layout.aux_width, dtype=layout.read_dtype)
        teacher = torch.empty(len(taught), layout.teacher_width, dtype=layout.read_dtype)
        token = torch.empty(len(read), dtype=torch.int64)
        rows = LocalRows(packed, read, len(packed))
        for first in range(0, len(read), ROWS_AT_ONCE):
            tile = read[first : first + ROWS_AT_ONCE]
            hidden = rows[first : first + len(tile)]
            normed, chosen = self.end.finish(hidden[:, -1], is_normed=False)
            token[first : first + len(tile)] = chosen
            for wanted, held, found in ((ordered, aux, hidden[:, :-1].flatten(1)), (taught, teacher, normed)):
                start, stop = np.searchsorted(wanted, (tile[0], tile[-1] + 1))
                kept = found.cpu()[np.isin(tile, wanted)]
                held[start:stop] = as_stored(kept, layout.dtype, layout.teacher_width)
        return SpanRows(
            plan, own, read, HeldRows(ordered, aux), HeldRows(taught, teacher), HeldRows(read, token)
        )


class _Packed:
    """The rows [n, S, Ht] of several files laid end to end; rows are read, and checked, when they are
    sliced.
    """

    def __init__(self, files: Sequence[RowFile], lengths: Sequence[int]) -> None:
        self.files, self.lengths = files, lengths

    def __len__(self) -> int:
        return sum(self.lengths)

    def __getitem__(self, rows: slice) -> Tensor:
        parts, offset = [], 0
        for file, length in zip(self.files, self.lengths, strict=True):
            first, last = max(rows.start - offset, 0), min(rows.stop - offset, length)
            if first < last:
                parts.append(file.rows(first, last))
            offset += length
        return torch.cat(parts) if parts else self.files[0].rows(0, 0)
