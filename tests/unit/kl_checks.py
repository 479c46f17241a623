"""What the fused soft cross entropy must do: used in Triton's interpreter and on GPUs."""

from __future__ import annotations

from typing import NamedTuple

import torch

from eagle3_ds.config import LossSection
from eagle3_ds.draft.tile_loss import FusedTerms
from eagle3_ds.losses import loss_of

GRADIENT = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Largest relative error of the gradient: the rounding of what is stored."""


class Case(NamedTuple):
    """A tile, and how sure draft and teacher are."""

    columns: int
    vocabulary: int
    draft_scale: float
    teacher_scale: float


CASES = {
    "one block": Case(5, 100, 1.0, 1.0),
    "several blocks": Case(3, 9000, 2.0, 3.0),
    "whole blocks": Case(2, 8192, 1.0, 0.0),
    "sure teacher": Case(4, 300, 3.0, 200.0),
    "sure draft": Case(4, 300, 60.0, 1.0),
    "no column": Case(0, 64, 1.0, 1.0),
}


def check_kl(case: Case, device: str, dtype: torch.dtype, fused: FusedTerms) -> None:
    """Against the plain form under autograd in fp64, at the same rounded logits."""
    generator = torch.Generator().manual_seed(0)
    size = (case.columns, case.vocabulary)
    # Rows lie apart, as in a tile whose columns are neighbours at another step.
    logits = (case.draft_scale * torch.randn(*size, generator=generator)).to(dtype)
    target = (case.teacher_scale * torch.randn(*size, generator=generator)).softmax(-1)
    weight = torch.rand(case.columns, generator=generator)
    weight[:1] = 0.0
    # Equal logits: the first of them is the draft's choice.
    logits[:, case.vocabulary // 2 :][:, :3] = logits.amax(1, keepdim=True) + 1

    leaf = logits.double().requires_grad_()
    value = loss_of(LossSection(kind="kl")).plain(leaf, target.double())
    (value * weight.double()).sum().backward()
    acceptance = torch.minimum(leaf.softmax(-1), target.double()).sum(-1)

    gradient = torch.full((case.columns, case.vocabulary + 7), float("nan"), dtype=dtype, device=device)
    gradient = gradient[:, : case.vocabulary]
    wide = torch.zeros(case.columns, case.vocabulary + 3, device=device)
    wide[:, : case.vocabulary] = target
    given = (logits.to(device), wide[:, : case.vocabulary], weight.to(device))
    found = fused(*given, gradient)
    without = fused(*given, None)
    for each in (found, without):
        assert each.best.tolist() == [case.vocabulary // 2] * case.columns
        torch.testing.assert_close(each.value.cpu().double(), value.detach(), rtol=2e-6, atol=1e-5)
        torch.testing.assert_close(each.acceptance.cpu().double(), acceptance.detach(), rtol=0, atol=1e-5)
    assert leaf.grad is not None
    error = (gradient.cpu().double() - leaf.grad).norm() / leaf.grad.norm().clamp(min=1e-30)
    # The exponent z - lse is rounded in fp32 to a part of the largest logit.
    of_exponent = torch.finfo(torch.float32).eps * float(logits.abs().amax()) if case.columns else 0.0
    assert not error > GRADIENT[dtype] + of_exponent, error
