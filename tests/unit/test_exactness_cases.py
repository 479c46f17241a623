"""The matrix covers what it says it covers, and its inputs are what their names say."""

import itertools

import pytest
import torch

from benchmarks.exactness_cases import (
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
from eagle3_ds.layout import PackedSequence, SpanPlan, prepare_usp_input
from eagle3_ds.model import DraftModel


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
    assert impossible == {((1, 1, 4), "gqa"), ((1, 1, 1), "unsupervised_rank")}


def test_every_case_can_stand_and_none_is_listed_twice():
    cases = full_matrix()
    assert len(set(cases)) == len(cases)
    for case in cases:
        assert is_allowed(case.factors())
        assert all(count % case.ulysses == 0 for count in HEADS[case.heads])


def test_the_matrix_is_far_from_the_full_product_and_the_same_every_time():
    assert len(full_matrix()) < 60 < len(allowed_pairs())
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


@pytest.mark.parametrize("case", [c for c in full_matrix() if c.documents == "unsupervised_rank"], ids=str)
def test_some_rank_has_no_supervised_slot_and_some_rank_has(case):
    inputs = make_inputs(case)
    counts = []
    for rank_batches in inputs.steps[0]:
        for ring_rank, ulysses_rank in itertools.product(range(case.ring), range(case.ulysses)):
            counts.append(0)
            for batch in rank_batches:
                pack = PackedSequence(batch.token_ids, batch.loss_mask, batch.lengths, batch.token_ids, batch.aux, batch.teacher)
                plan = SpanPlan.make(batch.lengths, case.ring, case.ulysses)
                local = prepare_usp_input(pack, plan, ring_rank, ulysses_rank, case.ttt_steps, case.alignment)
                counts[-1] += int(local.supervised.sum())
    assert min(counts) == 0 < max(counts)


def test_indivisible_lengths_do_not_divide():
    for case in full_matrix():
        sp = case.ring * case.ulysses
        if case.documents == "indivisible" and sp > 1:
            assert all(len(b.token_ids) % sp for step in make_inputs(case).step_batches() for b in step)
