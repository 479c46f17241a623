"""Every kernel that runs here against dense autograd in fp64, through the one interface they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import eagle3_ds.kernels.blockwise as blockwise_module
from eagle3_ds.kernels import KERNELS, AttentionKernel, Tile, merge_partial, select_kernel
from eagle3_ds.kernels.base import out_with_delta
from eagle3_ds.kernels.cuda import CudaKernel

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
HEAD_DIM = 16
SCALE = 0.3


class Case(NamedTuple):
    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    tiles: tuple[Tile, ...]


CASES = {
    "causal square": Case(33, 33, 4, 4, (Tile(0, 33, 0, 33, True),)),
    "causal rectangle": Case(20, 50, 4, 2, (Tile(0, 20, 0, 50, True),)),
    "full": Case(17, 40, 4, 1, (Tile(0, 17, 0, 40, False),)),
    "more queries than keys": Case(40, 7, 2, 2, (Tile(0, 40, 0, 7, False),)),
    "one row": Case(1, 9, 4, 2, (Tile(0, 1, 0, 9, True),)),
    "documents": Case(60, 60, 4, 2, (Tile(0, 21, 0, 21, True), Tile(21, 22, 21, 22, True), Tile(22, 60, 22, 60, True))),
    "chunks of one document": Case(24, 64, 2, 2, (Tile(0, 12, 0, 20, True), Tile(12, 24, 0, 60, True))),
    "rows in several tiles": Case(
        30, 70, 4, 2, (Tile(0, 30, 0, 25, False), Tile(10, 30, 40, 60, True), Tile(5, 12, 60, 70, False))
    ),
    "a key shown twice": Case(16, 30, 4, 4, (Tile(0, 16, 0, 20, False), Tile(4, 16, 10, 30, True))),
    "rows without a key": Case(25, 40, 4, 2, (Tile(3, 11, 5, 30, True), Tile(14, 20, 0, 9, False))),
    "empty tiles": Case(8, 12, 2, 1, (Tile(0, 8, 4, 4, False), Tile(3, 3, 0, 5, True), Tile(0, 8, 0, 12, True))),
    "sliding window": Case(50, 50, 4, 2, (Tile(0, 50, 0, 50, True, 13),)),
    "window of two tokens": Case(9, 9, 2, 2, (Tile(0, 9, 0, 9, True, 1),)),
    "window wider than the document": Case(20, 20, 2, 1, (Tile(0, 20, 0, 20, True, 30),)),
    "window in a later chunk": Case(24, 64, 4, 2, (Tile(0, 24, 8, 64, True, 32),)),
    "rows that leave an earlier block": Case(20, 40, 4, 2, (Tile(2, 20, 7, 39, False, 14),)),
    "left edge in a corner": Case(30, 40, 2, 1, (Tile(0, 10, 0, 20, False), Tile(10, 30, 0, 20, False, 0))),
    "no tile": Case(6, 6, 2, 1, ()),
}

USABLE = [
    pytest.param(
        kernel,
        device,
        dtype,
        id=f"{kernel.name}-{device}-{str(dtype).removeprefix('torch.')}",
        marks=[pytest.mark.gpu] if device == "cuda" else [],
    )
    for kernel in KERNELS
    for device in DEVICES
    for dtype in TOLERANCE
    if kernel.unavailable_reason(torch.device(device), dtype, HEAD_DIM) is None
]


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    other_out: Tensor
    other_lse: Tensor
    dout: Tensor


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8 and 12, so that the cases have many of them and ragged ones."""
    monkeypatch.setattr(blockwise_module, "_QUERY_BLOCK", 8)
    monkeypatch.setattr(blockwise_module, "_KEY_BLOCK", 12)


def make_inputs(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    """Random tensors, rounded to `dtype`, and a partial attention over other keys that shares the softmax."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device)

    queries = (case.num_queries, case.num_heads)
    keys = (case.num_keys, case.num_kv_heads, HEAD_DIM)
    rows = (*queries, HEAD_DIM)
    q, k, v, other_out, dout = (normal(*shape).to(dtype) for shape in (rows, keys, keys, rows, rows))
    return Inputs(q, k, v, other_out, normal(*queries) + 1, dout)


def dense(q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile]) -> tuple[Tensor, Tensor]:
    """Row by row, straight from the definition: the softmax over the list of keys that the tiles show the row."""
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
    grads = torch.autograd.grad(merged, (q, k, v), inputs.dout.double(), allow_unused=True, materialize_grads=True)
    return tuple(x.detach() for x in (out, lse, merged, merged_lse, *grads))


def error(actual: Tensor, wanted: Tensor) -> float:
    """Relative L2 error; the infinities must be in the same places."""
    actual = actual.double()
    assert torch.equal(actual.isinf(), wanted.isinf())
    finite = wanted.isfinite()
    difference = (actual[finite] - wanted[finite]).norm()
    return float(difference / wanted[finite].norm().clamp_min(1e-6))


def run_backward(kernel: AttentionKernel, inputs: Inputs, case: Case, merged: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """dq, dk, dv, from accumulators that already hold ones."""
    wide = torch.float64 if inputs.q.dtype == torch.float64 else torch.float32
    dk, dv = (torch.ones_like(x, dtype=wide) for x in (inputs.k, inputs.v))
    delta = (inputs.dout.double() * merged).sum(-1).to(wide)
    dq = kernel.backward(inputs.dout, inputs.q, inputs.k, inputs.v, lse.to(wide), delta, case.tiles, SCALE, dk, dv)
    assert dq.dtype == dk.dtype == dv.dtype == wide
    return dq, dk - 1, dv - 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("kernel", "device", "dtype"), USABLE)
def test_forward_equals_dense(kernel: AttentionKernel, device: str, dtype: torch.dtype, case: Case) -> None:
    inputs = make_inputs(case, device, dtype)
    out, lse = kernel.forward(inputs.q, inputs.k, inputs.v, case.tiles, SCALE)
    wanted_out, wanted_lse, *_ = expected(inputs, case, with_others=False)
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert out.shape == inputs.q.shape and lse.shape == inputs.q.shape[:2]
    assert error(out, wanted_out) <= TOLERANCE[dtype]
    assert error(lse, wanted_lse) <= TOLERANCE[dtype]


@pytest.mark.parametrize("with_others", [False, True], ids=["own softmax", "merged softmax"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("kernel", "device", "dtype"), USABLE)
def test_backward_equals_autograd(
    kernel: AttentionKernel, device: str, dtype: torch.dtype, case: Case, with_others: bool
) -> None:
    inputs = make_inputs(case, device, dtype)
    _, _, merged, merged_lse, *wanted = expected(inputs, case, with_others)
    for actual, gradient in zip(run_backward(kernel, inputs, case, merged, merged_lse), wanted, strict=True):
        assert error(actual, gradient) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("kernel", "device", "dtype"), USABLE)
def test_rows_without_gradient_get_none(kernel: AttentionKernel, device: str, dtype: torch.dtype) -> None:
    """A padded or unsupervised row has dout 0: a kernel that rebuilds its output from dout and delta divides by it."""
    case = CASES["documents"]
    inputs = make_inputs(case, device, dtype)
    inputs.dout[5:30] = 0
    _, _, merged, merged_lse, *wanted = expected(inputs, case, with_others=True)
    actual = run_backward(kernel, inputs, case, merged, merged_lse)
    assert torch.equal(actual[0][5:30], torch.zeros_like(actual[0][5:30]))
    assert all(error(a, w) <= TOLERANCE[dtype] for a, w in zip(actual, wanted, strict=True))


@pytest.mark.parametrize(("kernel", "device", "dtype"), USABLE)
def test_same_bits_twice(kernel: AttentionKernel, device: str, dtype: torch.dtype) -> None:
    case = CASES["rows in several tiles"]
    inputs = make_inputs(case, device, dtype)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (kernel.forward(inputs.q, inputs.k, inputs.v, case.tiles, SCALE) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        grads = [run_backward(kernel, inputs, case, first[0].double(), first[1]) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("kernel", "device", "dtype"), USABLE)
def test_operands_need_not_be_contiguous(kernel: AttentionKernel, device: str, dtype: torch.dtype) -> None:
    """The exchanges hand over slices of wider rows."""
    case = CASES["rows in several tiles"]
    inputs = make_inputs(case, device, dtype)
    strided = Inputs(*(torch.stack((x, x), dim=1)[:, 1] for x in inputs))
    assert not strided.q.is_contiguous()
    wanted_out, wanted_lse, merged, merged_lse, *wanted = expected(inputs, case, with_others=True)
    out, lse = kernel.forward(strided.q, strided.k, strided.v, case.tiles, SCALE)
    assert error(out, wanted_out) <= TOLERANCE[dtype] and error(lse, wanted_lse) <= TOLERANCE[dtype]
    for actual, gradient in zip(run_backward(kernel, strided, case, merged, merged_lse), wanted, strict=True):
        assert error(actual, gradient) <= TOLERANCE[dtype]


def emulated_flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cum_seq_q: None,
    cum_seq_k: None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int | None = None,
) -> tuple[Tensor, ...]:
    """FlashAttention-2 as torch documents it: [B, L, H, D], GQA, causal at the bottom right, lse [B, H, L]."""
    assert (cum_seq_q, cum_seq_k, max_q, max_k) == (None, None, q.shape[1], k.shape[1]) and dropout_p == 0.0
    out, lse = KERNELS[-1].forward(q[0], k[0], v[0], (Tile(0, max_q, 0, max_k, is_causal, window_size_left),), scale)
    state = torch.empty(2, dtype=torch.uint64)
    return out[None], lse.T[None].contiguous(), state, torch.empty((), dtype=torch.uint64), q.new_empty(0)


def emulated_flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cum_seq_q: None,
    cum_seq_k: None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float,
    window_size_left: int | None = None,
) -> tuple[Tensor, ...]:
    """The same for the backward, which computes delta from `out`."""
    assert (cum_seq_q, cum_seq_k, max_q, max_k) == (None, None, q.shape[1], k.shape[1]) and dropout_p == 0.0
    assert lse.shape == (1, q.shape[2], max_q) and lse.is_contiguous() and lse.dtype == torch.float32
    assert out.dtype == q.dtype and rng_state.dtype == unused.dtype == torch.uint64
    dk, dv = (torch.zeros_like(x[0], dtype=torch.float32) for x in (k, v))
    delta = (dout * out)[0].float().sum(-1)
    tile = Tile(0, max_q, 0, max_k, is_causal, window_size_left)
    dq = KERNELS[-1].backward(dout[0], q[0], k[0], v[0], lse[0].T, delta, (tile,), scale, dk, dv)
    return tuple(x[None].to(q.dtype) for x in (dq, dk, dv))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_cuda_calls_its_operators_right(case: Case) -> None:
    """Without a GPU: the real operator schemas, with an emulation behind them. The arithmetic is tested where a GPU is."""
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("_flash_attention_forward", emulated_flash_forward, "CPU")
        library.impl("_flash_attention_backward", emulated_flash_backward, "CPU")
        inputs = make_inputs(case, "cpu", torch.float32)
        wanted_out, wanted_lse, merged, merged_lse, *wanted = expected(inputs, case, with_others=True)
        out, lse = CudaKernel().forward(inputs.q, inputs.k, inputs.v, case.tiles, SCALE)
        assert error(out, wanted_out) <= 1e-5 and error(lse, wanted_lse) <= 1e-5
        for actual, gradient in zip(run_backward(CudaKernel(), inputs, case, merged, merged_lse), wanted, strict=True):
            assert error(actual, gradient) <= 1e-5
    finally:
        library._destroy()


def test_large_scores_do_not_overflow() -> None:
    case = CASES["causal rectangle"]
    inputs = make_inputs(case, "cpu", torch.float32)
    for kernel in KERNELS:
        if kernel.unavailable_reason(torch.device("cpu"), torch.float32, HEAD_DIM) is None:
            out, lse = kernel.forward(inputs.q * 300, inputs.k, inputs.v, case.tiles, SCALE)
            assert out.isfinite().all() and lse.isfinite().all() and lse.max() > 100


@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e30])
def test_out_with_delta_survives_any_magnitude(magnitude: float) -> None:
    dout = torch.randn(7, 3, 16, generator=torch.Generator().manual_seed(0)) * magnitude
    dout[2] = 0
    delta = dout.sum(-1)
    rebuilt = (dout.double() * out_with_delta(dout, delta).double()).sum(-1)
    torch.testing.assert_close(rebuilt, delta.double(), rtol=1e-6, atol=0.0)


def test_merge_of_two_empty_rows_is_empty() -> None:
    zero, nothing = torch.zeros(2, 1, 4), torch.full((2, 1), -torch.inf)
    out, lse = merge_partial(zero, nothing, zero, nothing)
    assert torch.equal(out, zero) and torch.equal(lse, nothing)


def test_causal_tile_with_too_few_keys_is_a_bug() -> None:
    x = torch.zeros(4, 1, 8)
    with pytest.raises(AssertionError, match="leaves rows without a key"):
        select_kernel("blockwise", torch.device("cpu"), torch.float32, 8).forward(x, x, x, (Tile(0, 4, 0, 3, True),), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_takes_the_fast_kernel_on_cpu(dtype: torch.dtype) -> None:
    assert select_kernel("auto", torch.device("cpu"), dtype, 64).name == "cpu"


@pytest.mark.parametrize("device", ["meta", "mps", "xpu"])
def test_auto_runs_on_any_device(device: str) -> None:
    assert select_kernel("auto", torch.device(device), torch.float32, 64).name == "blockwise"


def test_named_kernel_that_cannot_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'cuda' cannot run .* NVIDIA GPUs.* can: cpu, blockwise, reference"):
        select_kernel("cuda", torch.device("cpu"), torch.bfloat16, 64)
    with pytest.raises(ValueError, match=r"'cpu' cannot run .* not torch.float16.* can: blockwise, reference"):
        select_kernel("cpu", torch.device("cpu"), torch.float16, 64)
    with pytest.raises(ValueError, match=r"'flsh', but no kernel is named so.* these: cpu, blockwise, reference"):
        select_kernel("flsh", torch.device("cpu"), torch.float32, 64)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "reason"),
    [
        ((8, 0), torch.bfloat16, 128, None),
        ((9, 0), torch.float16, 256, None),
        ((9, 0), torch.float32, 128, "not torch.float32"),
        ((9, 0), torch.bfloat16, 100, "multiple of 8"),
        ((9, 0), torch.bfloat16, 264, "at most 256"),
        ((7, 5), torch.bfloat16, 64, "7.5"),
        ((8, 9), torch.bfloat16, 224, "no backward"),
    ],
)
def test_cuda_says_where_it_runs(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, head_dim: int, reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    said = CudaKernel().unavailable_reason(torch.device("cuda"), dtype, head_dim)
    assert said is None if reason is None else said is not None and reason in said
