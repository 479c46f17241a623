"""The reference at sampled slots equals the dense reference, on sequences that the latter can hold."""

from typing import Any

import pytest
import torch

from judge import sampled_reference
from judge.cases import Case, make_inputs
from judge.dense_reference import MicroBatch, reference_step
from judge.sampled_reference import SampledReference


def inputs_of(**changes):
    case = Case(**{"documents": "many_unaligned", **changes})
    inputs = make_inputs(case)
    weights = {name: weight.double() for name, weight in inputs.weights.items()}
    return case, inputs, weights, inputs.steps[0][0][0]


CASES: dict[str, dict[str, Any]] = {
    "many documents": {},
    "one document, seven steps": {"documents": "one", "ttt_steps": 7},
    "mask of the paper's code": {"alignment": "reference"},
    "window": {"window": 24, "heads": "mha"},
    "norms": {"norms": "all", "aux_layers": 5},
    "another loss": {"loss": "tv", "rope": "partial"},
    "longrope": {"rope": "longrope", "shape": "wide"},
}


@pytest.mark.parametrize("name", CASES)
def test_all_slots_sampled_are_the_dense_step(name, monkeypatch):
    monkeypatch.setattr(sampled_reference, "SLOT_BLOCK", 50)
    monkeypatch.setattr(sampled_reference, "SCORES_BLOCK", 1000)
    case, inputs, weights, batch = inputs_of(**CASES[name])
    arguments = (weights, inputs.config, inputs.frozen)
    dense = reference_step(*arguments, [batch], case.rules)
    reference = SampledReference(*arguments, batch, case.rules, range(len(batch.token_ids)))
    sampled = reference.step(reference.compute(), batch.loss_mask)
    for figure in ("loss", "step_loss", "step_accuracy", "tau", "acceptance_length", "grad_norm"):
        assert getattr(sampled, figure) == pytest.approx(getattr(dense, figure), rel=1e-12), figure
    for parameter, gradient in dense.gradients.items():
        difference = (sampled.gradients[parameter] - gradient).norm()
        assert difference <= 1e-12 * gradient.norm(), parameter


def test_a_few_slots_are_the_dense_step_under_a_mask_of_theirs():
    case, inputs, weights, batch = inputs_of(ttt_steps=3)
    mask = torch.zeros_like(batch.loss_mask)
    mask[[20, 21, 22, 50, 51, 90]] = True
    few = MicroBatch(batch.token_ids, mask, batch.lengths, batch.aux, batch.teacher)
    arguments = (weights, inputs.config, inputs.frozen)
    dense = reference_step(*arguments, [few], case.rules)
    chosen = torch.tensor([17, 18, 19, 20, 21, 47, 48, 49, 50, 87, 88, 89])
    reference = SampledReference(*arguments, few, case.rules, chosen)
    sampled = reference.step(reference.compute(), mask)
    assert sampled.loss == pytest.approx(dense.loss, rel=1e-12)
    assert sampled.tau == pytest.approx(dense.tau, rel=1e-12)
    for parameter, gradient in dense.gradients.items():
        assert (sampled.gradients[parameter] - gradient).norm() <= 1e-12 * gradient.norm(), parameter


def test_what_it_cannot_compute_is_refused():
    case, inputs, weights, batch = inputs_of()
    arguments = (weights, inputs.config, inputs.frozen, batch)
    reference = SampledReference(*arguments, case.rules, [3, 4])
    with pytest.raises(ValueError, match="slots that were not computed, for example"):
        reference.step(reference.compute(), torch.ones_like(batch.loss_mask))
    case, inputs, weights, batch = inputs_of(layers=2)
    with pytest.raises(ValueError, match="num_hidden_layers = 2"):
        SampledReference(weights, inputs.config, inputs.frozen, batch, case.rules, [3])
