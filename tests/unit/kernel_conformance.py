"""What every attention kernel must do, whatever computes it: used by the unit tests, on emulated operators,
and on GPUs.

Each check compares one kernel with dense autograd in fp64, written row by row from the definition of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from eagle3_ds.kernels import KERNELS, AttentionKernel, Tile, merge_partial

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
SCALE = 0.3


class Case(NamedTuple):
    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    tiles: tuple[Tile, ...]
    head_dim: int = 16


CASES = {
    "causal square": Case(33, 33, 4, 4, (Tile(0, 33, 0, 33, True),)),
    "causal rectangle": Case(20, 50, 4, 2, (Tile(0, 20, 0, 50, True),)),
    "full": Case(17, 40, 4, 1, (Tile(0, 17, 0, 40, False),)),
    "more queries than keys": Case(40, 7, 2, 2, (Tile(0, 40, 0, 7, False),)),
    "one row": Case(1, 9, 4, 2, (Tile(0, 1, 0, 9, True),)),
    "one key": Case(5, 9, 4, 2, (Tile(0, 5, 0, 1, False), Tile(0, 5, 3, 9, True))),
    "wide heads": Case(24, 24, 2, 1, (Tile(0, 24, 0, 24, True),), head_dim=128),
    "documents": Case(
        60, 60, 4, 2, (Tile(0, 21, 0, 21, True), Tile(21, 22, 21, 22, True), Tile(22, 60, 22, 60, True))
    ),
    "documents with gaps": Case(
        50, 80, 4, 2, (Tile(2, 20, 0, 18, True), Tile(20, 31, 30, 41, True), Tile(35, 50, 60, 75, True))
    ),
    "chunks of one document": Case(24, 64, 2, 2, (Tile(0, 12, 0, 20, True), Tile(12, 24, 0, 60, True))),
    "chunks of documents": Case(
        48,
        96,
        4,
        2,
        (
            Tile(0, 8, 0, 30, True),
            Tile(8, 20, 30, 42, True),
            Tile(20, 30, 0, 40, False),
            Tile(30, 48, 42, 90, True),
        ),
    ),
    "answers of two documents": Case(
        39,
        100,
        4,
        2,
        (
            Tile(0, 6, 0, 20, True),
            Tile(6, 10, 0, 31, True),
            Tile(10, 17, 0, 38, True),
            Tile(17, 20, 0, 41, True),
            Tile(20, 29, 0, 60, True),
            Tile(29, 30, 60, 70, True),
            Tile(30, 34, 60, 79, True),
            Tile(34, 39, 60, 100, True),
        ),
    ),
    "rows in several tiles": Case(
        30, 70, 4, 2, (Tile(0, 30, 0, 25, False), Tile(10, 30, 40, 60, True), Tile(5, 12, 60, 70, False))
    ),
    "a key shown twice": Case(16, 30, 4, 4, (Tile(0, 16, 0, 20, False), Tile(4, 16, 10, 30, True))),
    "rows without a key": Case(25, 40, 4, 2, (Tile(3, 11, 5, 30, True), Tile(14, 20, 0, 9, False))),
    "empty tiles": Case(
        8, 12, 2, 1, (Tile(0, 8, 4, 4, False), Tile(3, 3, 0, 5, True), Tile(0, 8, 0, 12, True))
    ),
    "sliding window": Case(50, 50, 4, 2, (Tile(0, 50, 0, 50, True, 13),)),
    "window over documents": Case(
        50, 50, 4, 2, (Tile(0, 7, 0, 7, True, 9), Tile(7, 40, 7, 40, True, 9), Tile(40, 50, 40, 50, True, 9))
    ),
    "window of two tokens": Case(9, 9, 2, 2, (Tile(0, 9, 0, 9, True, 1),)),
    "window wider than the document": Case(20, 20, 2, 1, (Tile(0, 20, 0, 20, True, 30),)),
    "window in a later chunk": Case(24, 64, 4, 2, (Tile(0, 24, 8, 64, True, 32),)),
    "rows that leave an earlier block": Case(20, 40, 4, 2, (Tile(2, 20, 7, 39, False, 14),)),
    "left edge in a corner": Case(30, 40, 2, 1, (Tile(0, 10, 0, 20, False), Tile(10, 30, 0, 20, False, 0))),
    "several blocks": Case(
        300, 420, 2, 1, (Tile(0, 140, 0, 140, True), Tile(140, 300, 0, 420, True)), head_dim=64
    ),
    "no tile": Case(6, 6, 2, 1, ()),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


Check = Callable[[AttentionKernel, str, torch.dtype], None]


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    other_out: Tensor
    other_lse: Tensor
    dout: Tensor


def kernels_on(device: str) -> list[Any]:
    """Each kernel that runs there, with each dtype it takes."""
    return [
        pytest.param(
            kernel.for_short_tiles(), device, dtype, id=f"{kernel.name}-{str(dtype).removeprefix('torch.')}"
        )
        for kernel in KERNELS
        for dtype in TOLERANCE
        if kernel.unavailable_reason(torch.device(device), dtype, head_dim=64) is None
    ]


def skip_if_unusable(kernel: AttentionKernel, device: str) -> None:
    """Skip with the reason for which none of the checks ran with this kernel."""
    reasons = [
        kernel.unavailable_reason(torch.device(device), dtype, head_dim=64)
        for dtype in (torch.bfloat16, torch.float32)
    ]
    if all(reasons):
        pytest.skip(f"{kernel.name}: {reasons[0]}")


def make_inputs(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    """Random tensors, rounded to `dtype`, and a partial attention over other keys that shares the softmax."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device)

    queries = (case.num_queries, case.num_heads)
    keys = (case.num_keys, case.num_kv_heads, case.head_dim)
    rows = (*queries, case.head_dim)
    q, k, v, other_out, dout = (normal(*shape).to(dtype) for shape in (rows, keys, keys, rows, rows))
    return Inputs(q, k, v, other_out, normal(*queries) + 1, dout)


def dense(q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile]) -> tuple[Tensor, Tensor]:
    """Row by row, straight from the definition: the softmax over the list of keys that the tiles show the
    row.
    """
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for row in range(q.shape[0]):
        seen: list[int] = []
        for tile in tiles:
            if tile.q_start <= row < tile.q_stop:
                own = tile.k_stop - (tile.q_stop - row)
                first = tile.k_start if tile.left is None else max(tile.k_start, own - tile.left)
                seen += range(first, own + 1 if tile.causal else tile.k_stop)
        keys, values = (x[seen].repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("hd,khd->hk", q[row], keys) * SCALE
        outs.append(torch.einsum("hk,khd->hd", scores.softmax(-1), values))
        lses.append(scores.logsumexp(-1) if seen else q.new_full((q.shape[1],), -torch.inf))
    return torch.stack(outs), torch.stack(lses)


def expected(inputs: Inputs, case: Case, with_others: bool) -> tuple[Tensor, ...]:
    """out and lse of the tiles alone, then out, lse, dq, dk, dv of the softmax merged with the other keys."""
    q, k, v, other_out = (x.double().clone().requires_grad_() for x in inputs[:4])
    out, lse = dense(q, k, v, case.tiles)
    merged, merged_lse = merge_partial(out, lse, other_out, inputs.other_lse) if with_others else (out, lse)
    grads = torch.autograd.grad(
        merged, (q, k, v), inputs.dout.double(), allow_unused=True, materialize_grads=True
    )
    return tuple(x.detach() for x in (out, lse, merged, merged_lse, *grads))


def error(actual: Tensor, wanted: Tensor) -> float:
    """Relative L2 error; the infinities must be in the same places."""
    actual = actual.double()
    assert torch.equal(actual.isinf(), wanted.isinf())
    finite = wanted.isfinite()
    difference = (actual[finite] - wanted[finite]).norm()
    return float(difference / wanted[finite].norm().clamp_min(1e-6))


def run_backward(
    kernel: AttentionKernel, inputs: Inputs, case: Case, merged: Tensor, lse: Tensor
) -> tuple[Tensor, ...]:
    """dq, dk, dv, from accumulators that already hold ones."""
    wide = torch.float64 if inputs.q.dtype == torch.float64 else torch.float32
    dk, dv = (torch.ones_like(x, dtype=wide) for x in (inputs.k, inputs.v))
    delta = (inputs.dout.double() * merged).sum(-1).to(wide)
    dq = kernel.backward(
        inputs.dout, inputs.q, inputs.k, inputs.v, lse.to(wide), delta, case.tiles, SCALE, dk, dv
    )
    assert dq.dtype == dk.dtype == dv.dtype == wide
    return dq, dk - 1, dv - 1


def check_forward(kernel: AttentionKernel, device: str, dtype: torch.dtype, case: Case) -> None:
    inputs = make_inputs(case, device, dtype)
    out, lse = kernel.forward(inputs.q, inputs.k, inputs.v, case.tiles, SCALE)
    wanted_out, wanted_lse, *_ = expected(inputs, case, with_others=False)
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert out.shape == inputs.q.shape and lse.shape == inputs.q.shape[:2]
    assert error(out, wanted_out) <= TOLERANCE[dtype]
    assert error(lse, wanted_lse) <= TOLERANCE[dtype]


def check_backward(
    kernel: AttentionKernel, device: str, dtype: torch.dtype, case: Case, with_others: bool
) -> None:
    """With and without other keys in the softmax, whose merged lse and delta the kernel is handed."""
    inputs = make_inputs(case, device, dtype)
    _, _, merged, merged_lse, *wanted = expected(inputs, case, with_others)
    for actual, gradient in zip(run_backward(kernel, inputs, case, merged, merged_lse), wanted, strict=True):
        assert (distance := error(actual, gradient)) <= TOLERANCE[dtype], distance


def check_rows_without_gradient(kernel: AttentionKernel, device: str, dtype: torch.dtype) -> None:
    """A padded or unsupervised row has dout 0: a kernel that rebuilds its output from dout and delta divides
    by it.
    """
    case = CASES["documents"]
    inputs = make_inputs(case, device, dtype)
    inputs.dout[5:30] = 0
    _, _, merged, merged_lse, *wanted = expected(inputs, case, with_others=True)
    actual = run_backward(kernel, inputs, case, merged, merged_lse)
    assert torch.equal(actual[0][5:30], torch.zeros_like(actual[0][5:30]))
    assert all(error(a, w) <= TOLERANCE[dtype] for a, w in zip(actual, wanted, strict=True))


def check_same_bits_twice(kernel: AttentionKernel, device: str, dtype: torch.dtype) -> None:
    case = CASES["several blocks"]
    inputs = make_inputs(case, device, dtype)
    torch.use_deterministic_algorithms(True)
    try:
        reason = kernel.unavailable_reason(torch.device(device), dtype, case.head_dim)
        if reason is not None:
            assert "deterministic" in reason
            return
        first, second = (kernel.forward(inputs.q, inputs.k, inputs.v, case.tiles, SCALE) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        grads = [run_backward(kernel, inputs, case, first[0].double(), first[1]) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def check_strided_operands(kernel: AttentionKernel, device: str, dtype: torch.dtype) -> None:
    """The exchanges hand over slices of wider rows."""
    case = CASES["rows in several tiles"]
    inputs = make_inputs(case, device, dtype)
    strided = Inputs(*(torch.stack((x, x), dim=1)[:, 1] for x in inputs))
    assert not strided.q.is_contiguous()
    wanted_out, wanted_lse, merged, merged_lse, *wanted = expected(inputs, case, with_others=True)
    out, lse = kernel.forward(strided.q, strided.k, strided.v, case.tiles, SCALE)
    assert error(out, wanted_out) <= TOLERANCE[dtype] and error(lse, wanted_lse) <= TOLERANCE[dtype]
    for actual, gradient in zip(run_backward(kernel, strided, case, merged, merged_lse), wanted, strict=True):
        assert (distance := error(actual, gradient)) <= TOLERANCE[dtype], distance


def check_large_scores(kernel: AttentionKernel, device: str, dtype: torch.dtype) -> None:
    case = CASES["causal rectangle"]
    inputs = make_inputs(case, device, dtype)
    out, lse = kernel.forward(inputs.q * 300, inputs.k, inputs.v, case.tiles, SCALE)
    assert out.isfinite().all() and lse.isfinite().all() and lse.max() > 100


CHECKS: tuple[Check, ...] = (
    check_rows_without_gradient,
    check_same_bits_twice,
    check_strided_operands,
    check_large_scores,
)
