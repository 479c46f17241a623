"""The kernels for GPUs and NPUs without one: real operator schemas and package signatures, with an emulation
behind them.

Their calls are checked against what the operators and packages document; the arithmetic is checked where a
GPU is, by tests/gpu, and that of NPUs nowhere yet. The emulations compute dense attention from the documented
masks and share no code with the kernels.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import Tensor

import eagle3_ds.kernels.cudnn as cudnn_module
from eagle3_ds.kernels import KERNELS, AttentionKernel, Tile, select_kernel
from eagle3_ds.kernels.base import TileKernel
from tests.unit import emulated_npu
from tests.unit import kernel_conformance as conformance
from tests.unit.emulated_dense import dense_backward, dense_forward
from tests.unit.kernel_conformance import Case, each_case

NAMES = ("cuda", "cudnn", "npu", "flash_attn2", "flash_attn3", "flash_attn4")


def kernel_called(name: str) -> AttentionKernel:
    return next(kernel for kernel in KERNELS if kernel.name == name)


def varlen_masks(
    q: Tensor,
    k: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    left: int,
    right: int,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, keys and mask of each sequence as FlashAttention 2 and 3 define them; -1: an unlimited side."""
    for x, offsets in ((q, cu_q), (k, cu_k)):
        assert x.dim() == 3 and x.stride(-1) == 1
        assert offsets.dtype == torch.int32 and offsets[0] == 0 and offsets[-1] == len(x)
    sizes_q, sizes_k = cu_q.diff(), cu_k.diff()
    assert (
        (max_q, max_k) == (int(sizes_q.max()), int(sizes_k.max())) and sizes_q.min() > 0 and sizes_k.min() > 0
    )
    if causal:
        right = 0
    if left >= max_k:
        left = -1
    if left >= 0 and right < 0:
        right = max_k
    for i in range(len(sizes_q)):
        num_q, num_k = int(sizes_q[i]), int(sizes_k[i])
        back = (torch.arange(num_q)[:, None] + num_k - num_q) - torch.arange(num_k)
        shown = (back <= left if left >= 0 else back == back) & (
            back >= -right if right >= 0 else back == back
        )
        yield slice(int(cu_q[i]), int(cu_q[i + 1])), slice(int(cu_k[i]), int(cu_k[i + 1])), shown


def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    left: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    for rows, keys, shown in varlen_masks(q, k, cu_q, cu_k, max_q, max_k, causal, left, -1):
        out[rows], lse[:, rows] = dense_forward(q[rows], k[keys], v[keys], scale, shown)
    return out, lse


def varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    left: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    assert lse.shape == (q.shape[1], q.shape[0]) and lse.is_contiguous() and lse.dtype == torch.float32
    assert out.dtype == dout.dtype == q.dtype and dout.stride(-1) == out.stride(-1) == 1
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for rows, keys, shown in varlen_masks(q, k, cu_q, cu_k, max_q, max_k, causal, left, -1):
        dq[rows], dk[keys], dv[keys] = dense_backward(
            dout[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows], scale, shown
        )
    return dq, dk, dv


def aten_flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int | None = None,
) -> tuple[Tensor, ...]:
    assert dropout_p == 0.0 and not return_debug_mask
    left = -1 if window_size_left is None else window_size_left
    out, lse = varlen_forward(q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, is_causal, left, scale)
    return out, lse, torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64), q.new_empty(0)


def aten_flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float,
    window_size_left: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    assert dropout_p == 0.0 and rng_state.dtype == unused.dtype == torch.uint64
    left = -1 if window_size_left is None else window_size_left
    return varlen_backward(
        dout, q, k, v, out, lse, cum_seq_q, cum_seq_k, max_q, max_k, is_causal, left, scale
    )


def top_left(q: Tensor, k: Tensor, is_causal: bool) -> Tensor:
    shown = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    return shown.tril() if is_causal else shown


def cudnn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float,
) -> tuple[Tensor | int, ...]:
    """[1, H, L, D], causal at the top left, lse [1, H, L, 1] or, in other versions of torch, [1, H, L]."""
    assert (attn_bias, compute_log_sumexp, dropout_p, return_debug_mask) == (None, True, 0.0, False)
    assert k.shape[2] > 1 and k.transpose(1, 2).is_contiguous() and q.transpose(1, 2).is_contiguous()
    query, key, value = (x[0].transpose(0, 1) for x in (q, k, v))
    out, lse = dense_forward(query, key, value, scale, top_left(q, k, is_causal))
    nothing = q.new_empty(0)
    return (
        out.transpose(0, 1)[None],
        lse[None, ..., None],
        nothing,
        nothing,
        q.shape[2],
        k.shape[2],
        nothing,
        nothing,
        nothing,
    )


def cudnn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    attn_bias: None,
    cum_seq_q: None,
    cum_seq_k: None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float,
) -> tuple[Tensor, ...]:
    assert (attn_bias, cum_seq_q, cum_seq_k, dropout_p) == (None, None, None, 0.0)
    assert (max_q, max_k) == (
        q.shape[2],
        k.shape[2],
    ) and philox_seed.dtype == philox_offset.dtype == torch.int64
    assert lse.shape == (*q.shape[:3], 1) and lse.is_contiguous() and lse.dtype == torch.float32
    assert all(x.transpose(1, 2).is_contiguous() for x in (dout, q, k, v, out))
    gradient, query, key, value, output = (x[0].transpose(0, 1) for x in (dout, q, k, v, out))
    shown = top_left(q, k, is_causal)
    grads = dense_backward(gradient, query, key, value, output, lse[0, ..., 0], scale, shown)
    return tuple(x.transpose(0, 1)[None] for x in grads)


def fa2_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of flash-attn 2.8's function that come before those for paged keys."""
    assert (dropout_p, window_size_right, softcap, alibi_slopes, return_softmax) == (
        0.0,
        -1,
        0.0,
        None,
        False,
    )
    out, lse = varlen_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal,
        window_size_left,
        softmax_scale,
    )
    return out, lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)


def fa2_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """All the arguments of flash-attn 2.8's function; the gradients are written into what it is given."""
    assert (dropout_p, window_size_right, softcap, alibi_slopes, rng_state, zero_tensors) == (
        0.0,
        -1,
        0.0,
        None,
        None,
        False,
    )
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    grads = varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal,
        window_size_left,
        softmax_scale,
    )
    for given, grad in zip((dq, dk, dv), grads, strict=True):
        assert given.is_contiguous()
        given.copy_(grad)
    return softmax_lse


FA3_FORWARD = """fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new = None, Tensor(v_new!)? v_new = None,
Tensor? q_v = None, Tensor(out!)? out = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None,
Tensor? cu_seqlens_k_new = None, Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None,
int? max_seqlen_k = None, Tensor? page_table = None, Tensor? kv_batch_idx = None, Tensor? leftpad_k = None,
Tensor? rotary_cos = None, Tensor? rotary_sin = None, Tensor? seqlens_rotary = None, Tensor? q_descale = None,
Tensor? k_descale = None, Tensor? v_descale = None, float? softmax_scale = None, bool is_causal = False,
int window_size_left = -1, int window_size_right = -1, int attention_chunk = 0, float softcap = 0.0,
bool is_rotary_interleaved = False, Tensor? scheduler_metadata = None, int num_splits = 0,
bool? pack_gqa = None, int sm_margin = 0) -> (Tensor(out!), Tensor, Tensor, Tensor)"""
FA3_BACKWARD = """bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse,
Tensor(dq!)? dq = None, Tensor(dk!)? dk = None, Tensor(dv!)? dv = None, Tensor? cu_seqlens_q = None,
Tensor? cu_seqlens_k = None, Tensor? seqused_q = None, Tensor? seqused_k = None,
int? max_seqlen_q = None, int? max_seqlen_k = None, float? softmax_scale = None, bool is_causal = False,
int window_size_left = -1, int window_size_right = -1, float softcap = 0.0, bool deterministic = False,
int sm_margin = 0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"""


def fa3_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, ...]:
    names = [argument.name for argument in torch.ops.flash_attn_3.fwd.default._schema.arguments]
    given = {**dict(zip(names[3:], rest, strict=False)), **options}
    assert given["num_splits"] == 1
    assert given.get("window_size_right", -1) == -1 and not given.get("attention_chunk")
    out, lse = varlen_forward(
        q,
        k,
        v,
        given["cu_seqlens_q"],
        given["cu_seqlens_k"],
        given["max_seqlen_q"],
        given["max_seqlen_k"],
        given.get("is_causal", False),
        given.get("window_size_left", -1),
        given["softmax_scale"],
    )
    return out, lse, q.new_empty(0), q.new_empty(0)


def fa3_backward(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    names = [argument.name for argument in torch.ops.flash_attn_3.bwd.default._schema.arguments]
    given = {**dict(zip(names, arguments, strict=False)), **options}
    assert given.get("window_size_right", -1) == -1
    grads = varlen_backward(
        given["dout"],
        given["q"],
        given["k"],
        given["v"],
        given["out"],
        given["softmax_lse"],
        given["cu_seqlens_q"],
        given["cu_seqlens_k"],
        given["max_seqlen_q"],
        given["max_seqlen_k"],
        given.get("is_causal", False),
        given.get("window_size_left", -1),
        given["softmax_scale"],
    )
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        given[name].copy_(grad)
    return tuple(given["dout"].new_empty(0) for _ in range(5))


def fa4_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None, None, None]:
    assert (
        qv is seqused_q is seqused_k is min_seqlen_k is page_table is softcap is window_size_right is None
        and return_lse
    )
    assert cu_seqlens_q is not None and max_seqlen_q is not None and softmax_scale is not None
    assert cu_seqlens_k is not None and max_seqlen_k is not None
    left = -1 if window_size_left is None else window_size_left
    out, lse = varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, left, softmax_scale
    )
    return out, lse, None, None


def fa4_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    deterministic: bool = False,
) -> tuple[Tensor, ...]:
    assert softcap == 0.0 and window_size_right is None and softmax_scale is not None
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    # The real one, on Hopper, is wrong for more.
    assert len(cu_seqlens_q) == len(cu_seqlens_k) == 2
    left = -1 if window_size_left is None else window_size_left
    return varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal,
        left,
        softmax_scale,
    )


def module_with(name: str, **functions: object) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(functions)
    return module


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every operator and package behind these kernels, computing on the CPU."""
    aten = torch.library.Library("aten", "IMPL")
    fa3 = torch.library.Library("flash_attn_3", "FRAGMENT")
    try:
        aten.impl("_flash_attention_forward", aten_flash_forward, "CPU")
        aten.impl("_flash_attention_backward", aten_flash_backward, "CPU")
        aten.impl("_scaled_dot_product_cudnn_attention", cudnn_forward, "CPU")
        aten.impl("_scaled_dot_product_cudnn_attention_backward", cudnn_backward, "CPU")
        fa3.define(FA3_FORWARD)
        fa3.define(FA3_BACKWARD)
        fa3.impl("fwd", fa3_forward, "CPU")
        fa3.impl("bwd", fa3_backward, "CPU")
        modules = {
            "flash_attn.flash_attn_interface": {
                "_flash_attn_varlen_forward": fa2_forward,
                "_flash_attn_varlen_backward": fa2_backward,
            },
            "flash_attn_3._C": {},
            "flash_attn.cute.interface": {"_flash_attn_fwd": fa4_forward, "_flash_attn_bwd": fa4_backward},
            "torch_npu": emulated_npu.OPERATORS,
        }
        for name, functions in modules.items():
            monkeypatch.setitem(sys.modules, name, module_with(name, **functions))
        monkeypatch.setattr(cudnn_module, "_SMALLEST", 8)
        yield
    finally:
        aten._destroy()
        fa3._destroy()


@each_case
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("emulated")
def test_calls_are_right(name: str, case: Case) -> None:
    conformance.check_forward(kernel_called(name), "cpu", torch.float32, case)
    conformance.check_backward(kernel_called(name), "cpu", torch.float32, case, with_others=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("emulated")
def test_operands_may_be_strided_and_gradients_zero(name: str) -> None:
    conformance.check_strided_operands(kernel_called(name), "cpu", torch.float32)
    conformance.check_rows_without_gradient(kernel_called(name), "cpu", torch.float32)


@pytest.mark.usefixtures("emulated")
def test_cudnn_follows_the_shape_of_the_statistics() -> None:
    q = torch.zeros(12, 2, 16)
    lse = torch.arange(24.0).view(12, 2)
    assert torch.equal(cudnn_module._statistics(lse, q), lse.T[None, ..., None])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cudnn"])
def test_a_pack_of_documents_is_one_call(name: str) -> None:
    kernel = kernel_called(name)
    assert isinstance(kernel, TileKernel)
    documents = [Tile(10 * i, 10 * i + 10, 10 * i, 10 * i + 10, True, 4) for i in range(50)]
    (call,) = kernel.calls(documents)
    assert call.rows.ranges == call.keys.ranges == (slice(0, 500),)
    # Two chunks of one document share keys, and so do not fit into one call.
    chunks = [Tile(0, 10, 0, 10, True), Tile(10, 20, 0, 20, True), Tile(20, 30, 20, 30, True)]
    assert [len(call.tiles) for call in kernel.calls(chunks)] == [2, 1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that says it has a Hopper GPU and none of the packages."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    return monkeypatch


def install(monkeypatch: pytest.MonkeyPatch, package: str, version: str, module: str | None) -> None:
    """Make one package look installed; without a module, it does not import."""

    def installed(name: str) -> str:
        if name != package:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", installed)
    if module is not None:
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))


PACKAGES = {
    "flash_attn2": ("flash-attn", "2.8.3", "flash_attn.flash_attn_interface", (8, 0)),
    "flash_attn3": ("flash-attn-3", "3.0.0", "flash_attn_3._C", (9, 0)),
    "flash_attn4": ("flash-attn-4", "4.0.0b36", "flash_attn.cute.interface", (10, 0)),
}


def why_not(name: str, dtype: torch.dtype, head_dim: int) -> str:
    """What a kernel says that cannot run."""
    reason = kernel_called(name).unavailable_reason(torch.device("cuda"), dtype, head_dim)
    assert reason is not None
    return reason


@pytest.mark.parametrize("name", PACKAGES)
def test_package_kernels_need_their_package(gpu: pytest.MonkeyPatch, name: str) -> None:
    package, version, module, capability = PACKAGES[name]
    gpu.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    device, kernel = torch.device("cuda"), kernel_called(name)
    assert why_not(name, torch.bfloat16, 128).endswith("is not installed")
    install(gpu, package, "1.9", None)
    assert why_not(name, torch.bfloat16, 128).endswith("and 1.9 is installed")
    install(gpu, package, version, None)
    assert f"{module} does not import" in why_not(name, torch.bfloat16, 128)
    install(gpu, package, version, module)
    assert kernel.unavailable_reason(device, torch.bfloat16, 128) is None
    assert select_kernel("auto", device, torch.bfloat16, 128) is kernel
    with pytest.raises(
        ValueError, match=f"'{name}' cannot run with torch.float32 .* torch.bfloat16 or torch.float16"
    ):
        select_kernel(name, device, torch.float32, 128)


def test_auto_takes_the_built_in_flash_without_a_package(gpu: pytest.MonkeyPatch) -> None:
    assert select_kernel("auto", torch.device("cuda"), torch.bfloat16, 128).name == "cuda"
    assert select_kernel("auto", torch.device("cuda"), torch.float32, 128).name == "blockwise"


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "head_dim", "reason"),
    [
        ("cuda", (8, 0), torch.bfloat16, 128, None),
        ("cuda", (9, 0), torch.float16, 256, None),
        ("cuda", (9, 0), torch.float32, 128, "not torch.float32"),
        ("cuda", (9, 0), torch.bfloat16, 100, "multiple of 8"),
        ("cuda", (9, 0), torch.bfloat16, 264, "at most 256"),
        ("cuda", (7, 5), torch.bfloat16, 64, "7.5"),
        ("cuda", (8, 9), torch.bfloat16, 224, "no backward"),
        ("cudnn", (9, 0), torch.bfloat16, 128, None),
        ("cudnn", (9, 0), torch.bfloat16, 192, "at most 128"),
        ("flash_attn3", (10, 0), torch.bfloat16, 128, "Hopper"),
        ("flash_attn4", (8, 0), torch.bfloat16, 128, "9.0"),
        ("flash_attn4", (9, 0), torch.bfloat16, 192, "at most 128"),
    ],
)
def test_says_where_it_runs(
    gpu: pytest.MonkeyPatch,
    name: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    reason: str | None,
) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    said = kernel_called(name).unavailable_reason(torch.device("cuda"), dtype, head_dim)
    assert said is None if reason is None else said is not None and reason in said


def test_cudnn_says_which_version_it_needs(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.backends.cudnn, "version", lambda: 90100)
    assert "9.5.1" in why_not("cudnn", torch.bfloat16, 128)


@pytest.mark.parametrize(
    ("name", "head_dim", "capability"),
    [("cudnn", 128, (9, 0)), ("flash_attn3", 256, (9, 0)), ("flash_attn4", 128, (12, 0))],
)
def test_says_that_it_is_not_deterministic(
    gpu: pytest.MonkeyPatch, name: str, head_dim: int, capability: tuple[int, int]
) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    gpu.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert "deterministic" in why_not(name, torch.bfloat16, head_dim)
