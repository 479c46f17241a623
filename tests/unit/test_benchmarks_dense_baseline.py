"""The measured baseline computes what the judge computes."""

import pytest
import torch

from judge.cases import Case, make_inputs
from judge.dense_baseline import ATTENTION_FORMS, DenseDraft
from judge.dense_reference import LossRules, reference_step


def inputs_of(documents, heads, **more):
    return make_inputs(Case(documents=documents, heads=heads, **more))


@pytest.mark.parametrize("attention", ATTENTION_FORMS)
@pytest.mark.parametrize(("documents", "heads"), [("many_unaligned", "gqa"), ("one", "mha")])
def test_loss_and_raw_gradients_are_the_references(documents, heads, attention):
    inputs = inputs_of(documents, heads)
    batch, rules = inputs.steps[0][0][0], LossRules(4, 0.8)
    weights = {name: weight.double() for name, weight in inputs.weights.items()}
    expected = reference_step(weights, inputs.config, inputs.frozen, [batch], rules)
    dense = DenseDraft(weights, inputs.config, inputs.frozen, rules, attention, torch.float64)
    for _ in range(2):  # A second step starts anew.
        loss, grad_norm = dense.step(batch)
    assert loss == pytest.approx(expected.loss, rel=1e-12)
    assert grad_norm == pytest.approx(expected.grad_norm, rel=1e-11)
    gradients = dense.gradients()
    assert gradients.keys() == expected.gradients.keys()
    for name, gradient in gradients.items():
        difference = (gradient - expected.gradients[name].reshape(-1)).norm()
        assert difference <= 1e-11 * expected.gradients[name].norm(), name


@pytest.mark.parametrize("attention", ATTENTION_FORMS)
def test_bf16_is_near(attention):
    inputs = inputs_of("many_unaligned", "gqa")
    batch, rules = inputs.steps[0][0][0], LossRules(4, 0.8)
    expected = reference_step(inputs.weights, inputs.config, inputs.frozen, [batch], rules)
    loss, grad_norm = DenseDraft(
        inputs.weights, inputs.config, inputs.frozen, rules, attention, torch.bfloat16
    ).step(batch)
    assert loss == pytest.approx(expected.loss, rel=2e-2)
    assert grad_norm == pytest.approx(expected.grad_norm, rel=2e-2)


def test_what_it_does_not_know_is_refused():
    inputs = inputs_of("one", "mha")
    with pytest.raises(ValueError, match="attention = 'flash' is unknown. Use one of eager, fused"):
        DenseDraft(inputs.weights, inputs.config, inputs.frozen, LossRules(2), "flash")
    with pytest.raises(ValueError, match="the baseline has one layer, served, supervised"):
        DenseDraft(inputs.weights, inputs.config, inputs.frozen, LossRules(2, 0.8, "reference"))
    with pytest.raises(ValueError, match="and learns by kl"):
        DenseDraft(inputs.weights, inputs.config, inputs.frozen, LossRules(2, kind="tv"))
    inputs = inputs_of("one", "mha", norms="eagle3.1")
    with pytest.raises(ValueError, match="fc_norm, norm_output: the baseline is the paper's draft"):
        DenseDraft(inputs.weights, inputs.config, inputs.frozen, LossRules(2))
