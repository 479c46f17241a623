"""SpanPlan and prepare_usp_input: every rank's view, in one process."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3_ds.algorithms.eagle3.supervision import TTTSupervision
from eagle3_ds.layout import (
    PackedSequence,
    SpanPlan,
    attention_work,
    live_slots,
    prepare_usp_input,
    slots_of_a_rank,
)
from tests.unit.span_plans import span_plans

plans = span_plans()


def all_ranks(plan) -> list[tuple[int, int]]:
    return [(r, u) for r in range(plan.ring) for u in range(plan.ulysses)]


def make_pack(lengths, width=2, stretch=1):
    """A loss mask of stretches of equal tokens."""
    length = sum(lengths)
    generator = torch.Generator().manual_seed(length)
    return PackedSequence(
        token_ids=torch.randint(0, 1000, (length,), generator=generator),
        loss_mask=(torch.rand(-(-length // stretch), generator=generator) < 0.6).repeat_interleave(stretch)[
            :length
        ],
        lengths=tuple(lengths),
        teacher_token=torch.randint(0, 1000, (length,), generator=generator),
        aux=torch.rand(length, 3 * width, generator=generator) + 1,
        teacher=torch.rand(length, width, generator=generator) + 1,
    )


@given(plans)
def test_every_slot_has_exactly_one_owner_and_shares_are_equal(plan):
    shares = [plan.slots(*rank) for rank in all_ranks(plan)]
    assert {len(share) for share in shares} == {plan.slots_per_rank}
    assert sorted(np.concatenate(shares)) == list(range(plan.padded_length))
    assert plan.length <= plan.padded_length


@given(plans)
def test_live_slots_are_the_first_and_every_rank_has_as_many(plan):
    """So are the ranks' other slots; what is not live is never needed for a query."""
    assert plan.live_per_rank >= 1
    for ring, ulysses in all_ranks(plan):
        slots = plan.slots(ring, ulysses)
        live, rest = slots[: plan.live_per_rank], slots[plan.live_per_rank :]
        assert (np.diff(live) > 0).all() and (np.diff(rest) > 0).all()
        assert (live == plan.live[ring, ulysses]).all()
        # Padding is last, so that rows of hidden states are read up to it.
        assert (np.diff((slots >= plan.length).astype(int)) >= 0).all()
    runs = {(run.slot, run.length) for rank in range(plan.ring) for run in plan.runs(rank)}
    assert {(run.slot, run.length) for rank in range(plan.ring) for run in plan.live_runs(rank)} <= runs


@given(st.integers(1, 3000), st.integers(0, 3000), st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
def test_shares_are_known_before_the_plan_is_made(length, num_live, ring, ulysses, chunks):
    live = np.zeros(length, dtype=np.bool_)
    live[length - min(num_live, length) :] = True
    plan = SpanPlan.make([length], ring, ulysses, chunks, live)
    shares = (plan.live_per_rank, plan.slots_per_rank)
    assert shares == slots_of_a_rank(length, int(live.sum()), ring, ulysses, chunks)
    assert live[plan.live[plan.live < length]].sum() == live.sum()
    # Evened out by less than a slot per chunk and peer.
    if plan.rest.size:
        assert plan.live.size - max(1, live.sum()) < max(1, ring * chunks) * ulysses


def test_live_work_is_balanced_where_answers_are_at_the_end():
    """Sixteen questions of 7k tokens with an answer of 1k each: the answers are what has work."""
    lengths = [8192] * 16
    live = np.tile(np.arange(8192) >= 7168, 16)
    plan = SpanPlan.make(lengths, ring=8, live=live)
    work = plan.ring_work()
    assert work.max() <= 1.05 * work.mean()
    assert plan.live_per_rank == 2048


def test_a_window_levels_the_work_of_late_slots():
    plan = SpanPlan.make([4096], ring=4, window=16)
    assert plan.ring_work().sum() == 4096 * 16 - 15 * 16 // 2
    # Full attention puts the last chunk alone with light ones; under a window all but the first chunk weigh
    # the same.
    assert plan.ring_work().max() - plan.ring_work().min() <= 120


@given(plans)
def test_sequence_order_undoes_the_concatenation_of_ring_ranks(plan):
    assert (plan.ring_slots.reshape(-1)[plan.sequence_order] == np.arange(plan.padded_length)).all()


@given(plans)
def test_runs_cover_the_real_columns_within_one_document_each(plan):
    for rank in range(plan.ring):
        covered: list[int] = []
        for run in plan.runs(rank):
            columns = np.arange(run.column, run.column + run.length)
            slots = np.arange(run.slot, run.slot + run.length)
            assert (plan.ring_slots[rank, columns] == slots).all()
            assert len(set(plan.document[slots])) == 1
            assert plan.position[run.document_start] == 0
            assert plan.document[run.document_start] == plan.document[run.slot]
            covered.extend(columns)
        assert covered == list(np.flatnonzero(plan.document[plan.ring_slots[rank]] >= 0))


def test_positions_restart_in_every_document_and_padding_belongs_to_none():
    plan = SpanPlan.make([3, 2], ring=2, ulysses=2, chunks_per_rank=1)
    assert plan.padded_length == 8
    assert plan.position.tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert plan.document.tolist() == [0, 0, 0, 1, 1, -1, -1, -1]


@pytest.mark.parametrize("median", [4_000, 16_000, 48_000])
def test_greedy_plan_is_balanced_on_simulated_128k_packs(median):
    ratios = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        lengths, room = [], 131_072
        while room:
            lengths.append(min(room, max(1, int(rng.lognormal(np.log(median), 1.0)))))
            room -= lengths[-1]
        work = SpanPlan.make(lengths, ring=8).ring_work()
        ratios.append(work.max() / work.mean())
    assert np.median(ratios) <= 1.03
    assert np.quantile(ratios, 0.9) <= 1.05


@pytest.mark.parametrize("seed", range(5))
def test_a_chunk_goes_to_the_rank_with_the_least_work_that_has_room(seed):
    lengths = np.random.default_rng(seed).integers(1, 200, size=20).tolist()
    plan = SpanPlan.make(lengths, ring=6, chunks_per_rank=4)
    size = plan.slots_per_rank // 4
    work = attention_work(plan.position, plan.document >= 0).reshape(24, size).sum(1)
    owned: list[list[int]] = [[] for _ in range(6)]
    for chunk in sorted(range(24), key=lambda c: (-work[c], c)):
        with_room = [chunks for chunks in owned if len(chunks) < 4]
        min(with_room, key=lambda chunks: sum(work[chunks])).append(chunk)
    assert (plan.live[:, 0, ::size] // size).tolist() == [sorted(chunks) for chunks in owned]


@pytest.mark.parametrize(
    "bad",
    [
        {"lengths": []},
        {"lengths": [4, 0]},
        {"lengths": [4], "ring": 0},
        {"lengths": [4], "live": np.ones(3, dtype=np.bool_)},
    ],
)
def test_a_plan_that_cannot_be_is_refused(bad):
    with pytest.raises(ValueError, match="lengths|must be >= 1|live has shape"):
        SpanPlan.make(**bad)


@settings(max_examples=60, deadline=None)
@given(
    plans, st.integers(1, 7), st.sampled_from(["served", "reference"]), st.integers(1, 30), st.integers(1, 8)
)
def test_a_rank_reads_what_the_whole_sequence_says(plan, steps, alignment, stretch, chunks):
    """Row `row + 1 + k` of the extended buffers is position i + 1 + k of the pack, wherever a slot is
    supervised.
    """
    pack = make_pack(plan.lengths, stretch=stretch)
    live = live_slots(plan.lengths, pack.loss_mask, TTTSupervision(steps, alignment))
    plan = SpanPlan.make(plan.lengths, plan.ring, plan.ulysses, chunks, live)
    seen = torch.zeros(steps, plan.padded_length, dtype=torch.bool)
    for rank in all_ranks(plan):
        batch = prepare_usp_input(pack, plan, *rank, TTTSupervision(steps, alignment))
        slots = torch.from_numpy(plan.slots(*rank))
        real = slots < plan.length
        assert batch.num_slots == int(real.sum())
        assert torch.equal(batch.aux[:][real], pack.aux[slots[real]])
        assert not batch.aux[:][~real].any()
        # Step 0 sees the token of every slot whose next is in the pack, live or not.
        inside = slots + 1 < plan.length
        assert torch.equal(batch.token_ids[batch.row + 1][inside], pack.token_ids[slots[inside] + 1])
        taught = set(plan.teacher_slots(*rank, steps))
        live_slots_here = slots[: plan.live_per_rank]
        for k in range(steps):
            counted = batch.supervised[k]
            read = live_slots_here[counted] + 1 + k
            assert torch.equal(batch.token_ids[batch.live_row + 1 + k][counted], pack.token_ids[read])
            assert torch.equal(batch.teacher[:][batch.live_row + 1 + k][counted], pack.teacher[read])
            assert taught.issuperset(read.tolist())
            seen[k, live_slots_here] = counted
    document = torch.from_numpy(plan.document)
    for k in range(steps):
        for slot in range(plan.padded_length):
            next_slot = slot + 1 + k
            inside = next_slot < plan.length and bool(document[slot] == document[next_slot])
            mask_slot = next_slot if alignment == "served" else slot + k
            assert bool(seen[k, slot]) == (inside and bool(pack.loss_mask[mask_slot]))


def test_a_pack_that_disagrees_with_its_lengths_is_refused():
    pack = make_pack([4, 4])
    plan = SpanPlan.make([4, 5])
    with pytest.raises(ValueError, match="token_ids has 8 rows, but the documents of the pack have 9"):
        prepare_usp_input(pack, plan, 0, 0, TTTSupervision(1))
