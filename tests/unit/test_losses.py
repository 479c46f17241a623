"""Each loss by hand against its plain form under autograd: values, acceptance and raw gradients, fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eagle3_ds.config import LossSection
from eagle3_ds.draft.tile_loss import TileTerms
from eagle3_ds.losses import LOSSES, loss_of

KINDS = sorted(LOSSES)
VOCABULARY = 11


def by_hand(kind: Any, logits: Tensor, target: Tensor) -> TileTerms:
    return loss_of(LossSection(kind=kind))(logits.clone(), target)


def by_autograd(kind: Any, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss_of(LossSection(kind=kind)).plain(leaf, target)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def teachers(rows: int, sharpness: float, generator: torch.Generator) -> Tensor:
    logits = torch.randn(rows, VOCABULARY, generator=generator, dtype=torch.float64)
    return (logits * sharpness).softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=st.integers(0, 99),
    sharpness=st.sampled_from([0.0, 1.0, 9.0]),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
)
@settings(max_examples=30)
def test_the_tile_form_is_the_plain_form(kind: str, seed: int, sharpness: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    target = teachers(5, sharpness, generator)
    logits = scale * torch.randn(5, VOCABULARY, generator=generator, dtype=torch.float64)
    value, gradient = by_autograd(kind, logits, target)
    found = by_hand(kind, logits, target)
    assert torch.allclose(found.value, value, rtol=1e-12, atol=1e-13)
    assert torch.allclose(found.dlogits, gradient, rtol=1e-10, atol=1e-14)
    assert torch.allclose(found.acceptance, torch.minimum(logits.softmax(-1), target).sum(-1), atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_that_agrees_has_nothing_to_learn(kind: str) -> None:
    target = teachers(4, 2.0, torch.Generator().manual_seed(0))
    found = by_hand(kind, target.log(), target)
    entropy = -(target * target.log()).sum(-1)
    assert torch.allclose(
        found.value, entropy if kind == "kl" else torch.zeros(4, dtype=torch.float64), atol=1e-12
    )
    assert torch.allclose(found.acceptance, torch.ones(4, dtype=torch.float64))
    if kind == "kl":
        assert found.dlogits.abs().max() < 1e-15


@pytest.mark.parametrize("kind", KINDS)
def test_distributions_that_do_not_meet_stay_finite(kind: str) -> None:
    """In fp32 the draft's probability of the teacher's token underflows to nil."""
    target = torch.zeros(1, VOCABULARY)
    target[0, 3] = 1.0
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 3], logits[0, 4] = -200.0, 200.0
    found = by_hand(kind, logits, target)
    assert found.value.isfinite().all() and found.dlogits.isfinite().all()
    assert found.acceptance.item() == 0.0


def test_total_variation_is_one_minus_acceptance() -> None:
    generator = torch.Generator().manual_seed(1)
    target, logits = teachers(6, 1.0, generator), torch.randn(6, VOCABULARY, generator=generator).double()
    half_l1 = 0.5 * (logits.softmax(-1) - target).abs().sum(-1)
    found = by_hand("tv", logits, target)
    assert torch.allclose(found.value, half_l1) and torch.allclose(found.acceptance, 1 - half_l1)


def test_against_a_sure_teacher_lk_alpha_is_cross_entropy() -> None:
    target = torch.eye(VOCABULARY, dtype=torch.float64)
    logits = torch.randn(
        VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    alpha, entropy = by_hand("lk_alpha", logits, target), by_hand("kl", logits, target)
    assert torch.allclose(alpha.value, entropy.value) and torch.allclose(alpha.dlogits, entropy.dlogits)


@pytest.mark.parametrize(("eta", "other"), [(0.0, "kl"), (1e6, "tv")])
def test_lk_lambda_lies_between_kl_and_total_variation(eta: float, other: str) -> None:
    generator = torch.Generator().manual_seed(3)
    target, logits = teachers(6, 1.0, generator), torch.randn(6, VOCABULARY, generator=generator).double()
    blend = loss_of(LossSection(kind="lk_lambda", lk_eta=eta))(logits.clone(), target)
    assert torch.allclose(blend.dlogits, by_hand(other, logits, target).dlogits, atol=1e-12)


def test_the_weight_of_lk_lambda_is_a_constant() -> None:
    """eta times alpha, not its derivative: at one column the gradient is the blend of the two gradients."""
    target = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    logits = torch.tensor([[0.1, 0.4, -0.3]], dtype=torch.float64)
    kl, tv = by_hand("kl", logits, target), by_hand("tv", logits, target)
    weight = math.exp(-3.0 * kl.acceptance.item())
    blend = by_hand("lk_lambda", logits, target)
    assert torch.allclose(blend.dlogits, weight * kl.dlogits + (1 - weight) * tv.dlogits)
