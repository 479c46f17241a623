"""Rows handed to the ranks that want them: every rank's part of the exchange, played in one process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from eagle3_ds.layout import SpanPlan
from eagle3_ds.train.capture import stretches
from eagle3_ds.train.online import HeldRows
from eagle3_ds.train.row_exchange import IntArray, RowExchange
from eagle3_ds.train.target_engine import SpanStates

LENGTHS = (19, 3, 26, 7, 1)
MESHES = [(1, 1), (2, 1), (1, 3), (2, 2), (3, 2)]


def own_slots(plan: SpanPlan) -> list[IntArray]:
    return [plan.slots(ring, ulysses) for ring in range(plan.ring) for ulysses in range(plan.ulysses)]


def exchanged(plan: SpanPlan, wanted: Sequence[IntArray]) -> list[torch.Tensor]:
    """What each rank ends up with when every row is its slot's number."""
    ranks = [RowExchange(plan, wanted, rank, None) for rank in range(len(wanted))]
    sent = [
        torch.from_numpy(slots)[rank.rows].split(rank.send_sizes)
        for rank, slots in zip(ranks, own_slots(plan), strict=True)
    ]
    results = []
    for place, rank in enumerate(ranks):
        assert [len(pieces[place]) for pieces in sent] == rank.receive_sizes
        results.append(torch.cat([pieces[place] for pieces in sent])[rank.arrival])
    return results


@pytest.mark.parametrize(("ring", "ulysses"), MESHES)
def test_every_rank_gets_its_halo(ring: int, ulysses: int) -> None:
    plan = SpanPlan.make(LENGTHS, ring, ulysses, chunks_per_rank=3)
    halos = [plan.halo_slots(r, u, 7) for r in range(ring) for u in range(ulysses)]
    wanted = [slots[slots < plan.length] for slots in halos]
    for found, slots in zip(exchanged(plan, wanted), wanted, strict=True):
        assert found.tolist() == slots.tolist()


def test_any_rows_to_any_rank_even_none() -> None:
    plan = SpanPlan.make(LENGTHS, 2, 2, chunks_per_rank=2)
    rng = np.random.default_rng(0)
    wanted = [np.flatnonzero(rng.random(plan.padded_length) < share) for share in (0.5, 0.0, 1.0, 0.1)]
    for found, slots in zip(exchanged(plan, wanted), wanted, strict=True):
        assert found.tolist() == slots.tolist()


@pytest.mark.parametrize(("ring", "ulysses"), MESHES)
def test_the_stretches_of_all_ranks_are_the_documents(ring: int, ulysses: int) -> None:
    plan = SpanPlan.make(LENGTHS, ring, ulysses, chunks_per_rank=3)
    seen: list[tuple[int, int]] = []
    for slots in own_slots(plan):
        rows = torch.from_numpy(slots)[:, None]
        for stretch in stretches(SpanStates(plan, slots, rows, rows, rows[:, 0])):
            held = slots[stretch.first : stretch.last]
            assert np.array_equal(held, np.arange(held[0], held[0] + len(held)))
            seen += [(stretch.document, stretch.start + row) for row in range(len(held))]
    assert sorted(seen) == [
        (document, row) for document, length in enumerate(LENGTHS) for row in range(length)
    ]


def test_held_rows_answer_by_place_and_know_what_they_lack() -> None:
    rows = HeldRows(np.array([3, 4, 5, 9, 10]), torch.arange(5)[:, None])
    assert rows[3:6].flatten().tolist() == [0, 1, 2]
    assert rows[10:11].flatten().tolist() == [4]
    assert rows[0:0].shape == (0, 1)
    with pytest.raises(AssertionError, match="not all on this rank"):
        rows[5:7]
