"""DFlash's anchors: chosen as the page and its reference say, the same for any packing and mesh; which
guesses count; and how both reach a rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eagle3_ds.algorithms.dflash.anchors import SampledAnchors, mixed
from eagle3_ds.algorithms.dflash.supervision import BlockSupervision
from eagle3_ds.algorithms.eagle3.supervision import TTTSupervision
from eagle3_ds.data.documents import FEATURES
from eagle3_ds.data.loader import HeldoutPacks, PackedLoader
from eagle3_ds.layout import PackedSequence, SpanPlan, live_slots, prepare_usp_input
from judge import dflash_reference as reference
from judge.dense_reference import LossRules, MicroBatch, is_supervised

GUESSES = 3
ALIGNMENTS = ("served", "predicted")
NOTHING = torch.zeros(0)


@st.composite
def packs(draw: st.DrawFn) -> tuple[tuple[int, ...], torch.Tensor]:
    """Lengths of documents, and a loss mask in stretches, as chats have, or of single tokens."""
    lengths = tuple(draw(st.lists(st.integers(1, 30), min_size=1, max_size=6)))
    length, stretch = sum(lengths), draw(st.sampled_from((1, 4)))
    flags = draw(st.lists(st.booleans(), min_size=-(-length // stretch), max_size=-(-length // stretch)))
    return lengths, torch.tensor(flags).repeat_interleave(stretch)[:length]


def micro_batch(
    lengths: tuple[int, ...], mask: torch.Tensor, anchors: torch.Tensor | None = None
) -> MicroBatch:
    return MicroBatch(torch.arange(len(mask)), mask, lengths, NOTHING, NOTHING, anchors)


def packed(
    lengths: tuple[int, ...], mask: torch.Tensor, anchors: torch.Tensor | None = None
) -> PackedSequence:
    tokens, rows = torch.arange(len(mask)), torch.ones(len(mask), 2)
    return PackedSequence(tokens, mask, lengths, tokens, rows, rows, anchors)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5))
def test_mixing_wraps_as_the_reference_does(numbers: list[int]) -> None:
    assert mixed(np.array(numbers, dtype=np.uint64)).tolist() == [reference._mixed(x) for x in numbers]


@given(
    packs(),
    st.sampled_from((0.01, 0.3, 0.5, 1.0)),
    st.integers(0, 2**63),
    st.integers(0, 9),
    st.sampled_from(ALIGNMENTS),
    st.data(),
)
def test_anchors_are_the_references(
    pack: Any, share: float, seed: int, visit: int, alignment: Any, data: st.DataObject
) -> None:
    lengths, mask = pack
    ids = data.draw(st.lists(st.integers(0, 2**62), min_size=len(lengths), max_size=len(lengths)))
    rule = BlockSupervision(GUESSES, alignment)
    found = SampledAnchors(rule, share, seed)(visit, ids, lengths, mask)
    rules = LossRules(GUESSES, alignment=alignment)
    assert torch.equal(
        found, reference.sampled_anchors(micro_batch(lengths, mask), rules, share, seed, visit, ids)
    )
    candidates = is_supervised(micro_batch(lengths, mask), alignment, 0)
    for one, of_all in zip(found.split(lengths), candidates.split(lengths), strict=True):
        assert int(one.sum()) == math.ceil(share * int(of_all.sum()))


@given(packs(), st.randoms(use_true_random=False), st.sampled_from(ALIGNMENTS))
def test_a_documents_anchors_depend_on_no_other_document(pack: Any, random: Any, alignment: Any) -> None:
    lengths, mask = pack
    choose = SampledAnchors(BlockSupervision(GUESSES, alignment), 0.4, 7)
    ids = list(range(50, 50 + len(lengths)))
    together = dict(zip(ids, choose(2, ids, lengths, mask).split(lengths), strict=True))
    masks = dict(zip(ids, mask.split(lengths), strict=True))
    random.shuffle(ids)
    cut = random.randint(0, len(ids))
    for part in (ids[:cut], ids[cut:]):
        sizes = [len(masks[i]) for i in part]
        again = choose(2, part, sizes, torch.cat([masks[i] for i in part])) if part else torch.zeros(0)
        for i, chosen in zip(part, again.split(sizes) if part else (), strict=True):
            assert torch.equal(chosen, together[i])


def test_visits_documents_and_seeds_choose_otherwise() -> None:
    mask, rule = torch.ones(200, dtype=torch.bool), BlockSupervision(GUESSES)

    def chosen(seed: int, visit: int, document: int) -> tuple[bool, ...]:
        return tuple(SampledAnchors(rule, 0.5, seed)(visit, [document], [200], mask).tolist())

    assert len({chosen(s, v, d) for s in (0, 1) for v in (0, 1) for d in (0, 1)}) == 8
    # A half of many, chosen without regard to their place: the first half of the document has its share.
    assert 30 < sum(chosen(0, 0, 0)[:100]) < 70


@given(packs(), st.sampled_from(ALIGNMENTS), st.integers(1, 6))
def test_what_counts_of_a_candidate_is_the_references(pack: Any, alignment: Any, guesses: int) -> None:
    lengths, mask = pack
    document = np.repeat(np.arange(len(lengths)), lengths)
    # Padding behind the documents has no entry in the mask.
    document = np.concatenate((document, np.full(5, -1)))
    found = BlockSupervision(guesses, alignment)(document, np.arange(len(document)), mask.numpy())
    candidates = is_supervised(micro_batch(lengths, mask), alignment, 0)
    batch = micro_batch(lengths, mask, candidates)
    expected = torch.stack([is_supervised(batch, alignment, k) for k in range(guesses)])
    assert not found[:, len(mask) :].any()
    assert torch.equal(torch.from_numpy(found[:, : len(mask)]), expected)


@given(
    packs(),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from(ALIGNMENTS),
    st.sampled_from((0.3, None)),
)
def test_every_anchor_is_one_ranks_live_slot(
    pack: Any, ring: int, ulysses: int, chunks: int, alignment: Any, share: float | None
) -> None:
    lengths, mask = pack
    rule = BlockSupervision(GUESSES, alignment)
    anchors = None
    if share is not None:
        anchors = SampledAnchors(rule, share, 1)(0, list(range(len(lengths))), lengths, mask)
    live = live_slots(lengths, mask, rule, anchors)
    chosen = live_slots(lengths, mask, rule) if anchors is None else anchors.numpy()
    assert (live == chosen).all()
    plan = SpanPlan.make(lengths, ring, ulysses, chunks, live)
    expected = rule(plan.document, np.arange(plan.padded_length), mask.numpy())
    expected[:, : plan.length] &= chosen
    seen, slots_counted = np.zeros_like(expected), 0
    for r in range(ring):
        for u in range(ulysses):
            batch = prepare_usp_input(packed(lengths, mask, anchors), plan, r, u, rule)
            assert batch.supervised.shape == (GUESSES, plan.live_per_rank) and plan.live_per_rank >= 1
            assert not seen[:, plan.live[r, u]].any()
            seen[:, plan.live[r, u]] = batch.supervised.numpy()
            slots_counted += batch.num_slots
    assert (seen == expected).all()
    assert slots_counted == chosen.sum(), "loss.reduction: slots divides by all anchors"


def test_eagle3s_slots_are_all_that_hold_a_token() -> None:
    mask = torch.arange(20) % 3 == 0
    rule = TTTSupervision(GUESSES)
    plan = SpanPlan.make((13, 7), 2, 1, 2, live_slots((13, 7), mask, rule))
    batches = [prepare_usp_input(packed((13, 7), mask), plan, r, 0, rule) for r in range(2)]
    assert sum(batch.num_slots for batch in batches) == 20


def test_an_anchor_that_is_not_live_is_not_lost_silently() -> None:
    mask, rule = torch.ones(64, dtype=torch.bool), BlockSupervision(GUESSES)
    few = torch.zeros(64, dtype=torch.bool)
    few[3] = True
    plan = SpanPlan.make((64,), 1, 1, 1, live_slots((64,), mask, rule, few))
    with pytest.raises(AssertionError, match="not live"):
        prepare_usp_input(packed((64,), mask, torch.ones(64, dtype=torch.bool)), plan, 0, 0, rule)
    with pytest.raises(ValueError, match="anchors has 63 rows"):
        prepare_usp_input(packed((64,), mask, few[:63]), plan, 0, 0, rule)


class Zeros:
    """Hidden states of any document."""

    def require_documents(self, lengths: Any) -> None:
        pass

    def states(self, documents: Any, token_ids: torch.Tensor, *_: Any) -> Any:
        rows = torch.zeros(len(token_ids), 2)
        return token_ids, rows, rows

    def announce(self, packs: Any) -> None:
        pass

    def close(self) -> None:
        pass


LENGTHS = (40, 12, 33, 25, 8, 19, 31)


def loader(draft_dp: int = 1, dp_rank: int = 0, accumulation: int = 1, room: int = 40) -> PackedLoader:
    rows = [
        {"input_ids": [n] * length, "loss_mask": [True] * length, "document_id": n + 100}
        for n, length in enumerate(LENGTHS)
    ]
    choose = SampledAnchors(BlockSupervision(GUESSES), 0.5, 9)
    dataset = datasets.Dataset.from_list(rows, features=FEATURES)
    return PackedLoader(dataset, Zeros(), room, draft_dp, dp_rank, accumulation, 4, anchors=choose)


Chosen = dict[tuple[int, int], tuple[bool, ...]]


def chosen_in(loaders: Sequence[PackedLoader], epochs: int) -> Chosen:
    """The anchors of every document in every epoch, by (epoch, document)."""
    found: Chosen = {}
    seen = [0] * len(LENGTHS)
    for step in range(loaders[0].steps_in(epochs)):
        steps = [one.step(step) for one in loaders]
        for turn in range(loaders[0].accumulation):
            for share in steps:
                pack = share[turn]
                assert pack.anchors is not None
                for ids, anchors in zip(
                    pack.token_ids.split(pack.lengths), pack.anchors.split(pack.lengths), strict=True
                ):
                    document = int(ids[0])
                    if seen[document] < epochs:
                        found[seen[document], document] = tuple(anchors.tolist())
                    seen[document] += 1
    return found


def test_a_run_on_another_mesh_or_in_other_packs_has_the_same_anchors() -> None:
    alone = chosen_in([loader()], 3)
    assert len(alone) == 3 * len(LENGTHS)
    assert chosen_in([loader(2, 0), loader(2, 1)], 3) == alone
    assert chosen_in([loader(accumulation=2)], 3) == alone
    assert chosen_in([loader(room=90)], 3) == alone
    assert alone[0, 0] != alone[1, 0], "another epoch chooses others"
    expected = SampledAnchors(BlockSupervision(GUESSES), 0.5, 9)(
        1, [102], [LENGTHS[2]], torch.ones(33, dtype=torch.bool)
    )
    assert alone[1, 2] == tuple(expected.tolist())


def test_a_document_alone_has_the_anchors_of_its_step_and_heldout_has_all() -> None:
    one = loader()
    last = one.steps_in(2) - 1
    (pack,) = one.step(last)
    assert pack.anchors is not None
    for place, anchors in enumerate(pack.anchors.split(pack.lengths)):
        of_document = one.document(last, place).anchors
        assert of_document is not None and torch.equal(of_document, anchors)
    assert all(pack.anchors is None for pack in HeldoutPacks(loader()))
