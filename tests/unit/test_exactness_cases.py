"""The matrix covers what it says it covers, and its inputs are what their names say."""

import itertools

import pytest
import torch

from eagle3_ds.algorithms.eagle3 import DraftModel
from eagle3_ds.algorithms.eagle3.supervision import TTTSupervision
from eagle3_ds.layout import PackedSequence, SpanPlan, live_slots, prepare_usp_input
from judge.cases import (
    FACTORS,
    HEADS,
    allowed_pairs,
    covered_pairs,
    full_matrix,
    is_allowed,
    make_inputs,
    parameter_shapes,
    short_matrix,
)


def test_every_pair_of_values_appears():
    seen = set().union(*map(covered_pairs, full_matrix()))
    for a, b in itertools.combinations(FACTORS, 2):
        for x, y in itertools.product(FACTORS[a], FACTORS[b]):
            assert (((a, x), (b, y)) in seen) == is_allowed({a: x, b: y}), f"{a} = {x} with {b} = {y}"


def test_only_the_impossible_is_left_out():
    impossible = {
        (x, y)
        for (a, b) in itertools.combinations(FACTORS, 2)
        for x, y in itertools.product(FACTORS[a], FACTORS[b])
        if not is_allowed({a: x, b: y})
    }
    # Gradients of min(p, q) jump where rounding decides: tests/unit/test_loss.py judges them in bf16.
    of_rounding = {("bfloat16", kind) for kind in ("tv", "lk_alpha", "lk_lambda")}
    # docs/peagle.md: what names the EAGLE code's shift of the mask, or is about what a next step reads.
    of_peagle = {("reference", "peagle"), ("eagle3.1", "peagle"), ("all", "peagle")}
    assert impossible == {((1, 1, 4), "gqa"), ((1, 1, 1), "unsupervised_rank")} | of_rounding | of_peagle


def test_every_case_can_stand_and_none_is_listed_twice():
    cases = full_matrix()
    assert len(set(cases)) == len(cases)
    for case in cases:
        assert is_allowed(case.factors())
        assert all(count % case.ulysses == 0 for count in HEADS[case.heads])


def test_the_matrix_is_far_from_the_full_product_and_the_same_every_time():
    assert len(full_matrix()) < 70 < len(allowed_pairs())
    assert full_matrix() == full_matrix()


def test_the_short_matrix_shows_every_value_that_fits():
    cases = short_matrix()
    assert set(cases) <= set(full_matrix())
    for name, values in FACTORS.items():
        assert {case.factors()[name] for case in cases} == set(values) - {(2, 2, 2)}, name


def test_inputs_are_a_pure_function_of_case_and_seed():
    case = full_matrix()[0]
    first, second, other = make_inputs(case), make_inputs(case), make_inputs(case, seed=1)
    assert torch.equal(first.steps[2][0][0].aux, second.steps[2][0][0].aux)
    assert torch.equal(first.weights["fc.weight"], second.weights["fc.weight"])
    assert not torch.equal(first.weights["fc.weight"], other.weights["fc.weight"])


@pytest.mark.parametrize("layers", [1, 2])
def test_parameters_are_those_of_the_draft(layers):
    inputs = make_inputs(next(case for case in full_matrix() if case.layers == layers))
    draft = {name: tuple(parameter.shape) for name, parameter in DraftModel(inputs.config).named_parameters()}
    assert parameter_shapes(inputs.config) == draft


def local_batches(case):
    """Of the first step, by rank: what each holds of its micro-batches, cut as the trainer cuts."""
    for rank_batches in make_inputs(case).steps[0]:
        for rank in itertools.product(range(case.ring), range(case.ulysses)):
            yield [cut(case, batch, rank) for batch in rank_batches]


def cut(case, batch, rank: tuple[int, int]):
    pack = PackedSequence(
        batch.token_ids, batch.loss_mask, batch.lengths, batch.token_ids, batch.aux, batch.teacher
    )
    supervision = TTTSupervision(case.ttt_steps, case.alignment)
    live = live_slots(batch.lengths, batch.loss_mask, supervision) if case.layers == 1 else None
    plan = SpanPlan.make(batch.lengths, case.ring, case.ulysses, live=live)
    return prepare_usp_input(pack, plan, *rank, supervision)


@pytest.mark.parametrize("case", [c for c in full_matrix() if c.documents == "unsupervised_rank"], ids=str)
def test_some_rank_has_no_supervised_slot_and_some_rank_has(case):
    """The live slots of one sequence are shared out, so that all of its ranks may have some, but for drafts
    of more layers.
    """
    counts = [sum(int(batch.supervised.sum()) for batch in batches) for batches in local_batches(case)]
    assert max(counts) > 0
    assert min(counts) == 0 or (case.draft_dp == 1 and case.layers == 1)


@pytest.mark.parametrize("case", [c for c in full_matrix() if c.documents == "answers"], ids=str)
def test_of_answers_less_than_half_of_the_slots_are_live(case):
    for batches in local_batches(case):
        for batch in batches:
            plan = batch.plan
            assert (
                plan.live_per_rank <= 0.55 * plan.slots_per_rank if case.layers == 1 else not plan.rest.size
            )


def test_indivisible_lengths_do_not_divide():
    for case in full_matrix():
        sp = case.ring * case.ulysses
        if case.documents == "indivisible" and sp > 1:
            assert all(len(b.token_ids) % sp for step in make_inputs(case).step_batches() for b in step)
