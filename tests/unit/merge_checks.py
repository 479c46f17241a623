"""The merge of the diagonal keys against autograd over one dense softmax, for the unit tests and for GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eagle3_ds.attention import merge

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SCALE = 0.2


class Shape(NamedTuple):
    slots: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    diagonals: int


SHAPES = {
    "one diagonal": Shape(37, 4, 4, 64, 1),
    "grouped": Shape(37, 8, 2, 64, 3),
    "one key head": Shape(20, 6, 1, 80, 2),
    "seven": Shape(33, 4, 2, 128, 7),
    "wide heads": Shape(9, 2, 1, 256, 2),
    "one slot": Shape(1, 4, 2, 64, 2),
}


class Inputs(NamedTuple):
    out0: Tensor
    lse0: Tensor
    q: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    dout: Tensor


def make_inputs(shape: Shape, device: str, dtype: torch.dtype) -> Inputs:
    """Random tensors rounded to `dtype`, operands strided as slices are; the first slot is padding, without a
    step-0 key.
    """
    generator = torch.Generator().manual_seed(0)

    def rows(heads: int) -> Tensor:
        wide = torch.randn(shape.slots, heads, 2 * shape.head_dim, generator=generator, dtype=torch.float64)
        return wide.to(device, dtype)[..., : shape.head_dim]

    out0, q, dout = rows(shape.num_heads), rows(shape.num_heads), rows(shape.num_heads)
    keys, values = ([rows(shape.num_kv_heads) for _ in range(shape.diagonals)] for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lse0 = torch.randn(shape.slots, shape.num_heads, generator=generator, dtype=torch.float64).to(
        device, wide
    )
    if shape.slots > 1:
        out0[0], lse0[0] = 0, -torch.inf
    return Inputs(out0, lse0, q, keys, values, dout)


def expected(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """out, lse, dq, dkeys, dvalues in fp64: one softmax over the diagonal keys and a key of score lse0 and
    value out0.
    """
    out0, lse0 = inputs.out0.double(), inputs.lse0.double()
    group = inputs.q.shape[1] // inputs.keys[0].shape[1]
    q, *diagonals = (x.double().clone().requires_grad_() for x in (inputs.q, *inputs.keys, *inputs.values))
    keys, values = (
        torch.stack(half).repeat_interleave(group, dim=2)
        for half in (diagonals[: len(inputs.keys)], diagonals[len(inputs.keys) :])
    )
    scores = torch.cat((lse0[None], (q * keys).sum(-1) * SCALE))
    out = (scores.softmax(0)[..., None] * torch.cat((out0[None], values))).sum(0)
    dq, *grads = torch.autograd.grad(out, (q, *diagonals), inputs.dout.double())
    half = len(inputs.keys)
    return out.detach(), scores.logsumexp(0).detach(), dq, grads[:half], grads[half:]


def assert_close(actual: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    distance = float((actual.double() - wanted).norm() / wanted.norm())
    assert distance <= TOLERANCE[dtype], distance


def check_merge(
    shape: Shape,
    device: str,
    dtype: torch.dtype,
    merge_diagonals: Callable[..., tuple[Tensor, Tensor]] = merge.merge_diagonals,
    merge_diagonals_backward: Callable[..., Tensor] = merge.merge_diagonals_backward,
) -> None:
    """Output, log-sum-exp, and every gradient, the diagonals' added to what is there already."""
    inputs = make_inputs(shape, device, dtype)
    wanted_out, wanted_lse, wanted_dq, wanted_dkeys, wanted_dvalues = expected(inputs)
    out, lse = merge_diagonals(inputs.out0, inputs.lse0, inputs.q, inputs.keys, inputs.values, SCALE)
    assert out.dtype == dtype and lse.dtype == inputs.lse0.dtype
    assert_close(out, wanted_out, dtype)
    assert_close(lse, wanted_lse, lse.dtype)
    delta = (inputs.dout.double() * wanted_out).sum(-1).to(lse.dtype)
    dkeys, dvalues = ([torch.ones_like(key) for key in inputs.keys] for _ in range(2))
    dq = merge_diagonals_backward(
        inputs.dout,
        inputs.q,
        inputs.keys,
        inputs.values,
        wanted_lse.to(lse.dtype),
        delta,
        SCALE,
        dkeys,
        dvalues,
    )
    assert dq.dtype == dtype and dq.shape == inputs.q.shape
    assert_close(dq, wanted_dq, dtype)
    for added, wanted in zip((*dkeys, *dvalues), (*wanted_dkeys, *wanted_dvalues), strict=True):
        assert_close(added, wanted + 1, dtype)
