"""The operators of torch and of the flash-attn packages for NVIDIA GPUs on the CPU, with their rules.

docs/kernels.md says which rule is where. A broken rule is an AssertionError that names it. Two kinds of calls
are refused that an operator takes: those that it computes wrongly without a word (a log-sum-exp in another
layout, cumulated lengths that do not fit), and those with a row without a key, whose log-sum-exp is +inf for
some and -inf for others.

The arithmetic is dense attention in fp32 under the documented masks and shares no code with the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.unit.emulated_dense import dense_backward, dense_forward

HALF_DTYPES = (torch.bfloat16, torch.float16)

dtypes: tuple[torch.dtype, ...] = HALF_DTYPES
"""What the operators take. A test may add fp32, to hold masks and formulas closer than half dtypes allow."""


def check_operands(q: Tensor, k: Tensor, v: Tensor, heads: int, most_head_dim: int) -> None:
    """What all of them want of q, k and v, whose heads are dimension `heads`."""
    assert q.dtype in dtypes, f"dtype: {q.dtype} is none of {dtypes}"
    assert k.dtype == v.dtype == q.dtype, "dtype: q, k and v have different ones"
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "the last dimension has a stride"
    assert k.shape == v.shape and k.shape[-1] == q.shape[-1], "shape: k, v or the head size differ"
    assert q.shape[-1] % 8 == 0 and q.shape[-1] <= most_head_dim, f"head size {q.shape[-1]}"
    assert q.shape[heads] % k.shape[heads] == 0, "heads: those of k do not divide those of q"


def check_output(q: Tensor, out: Tensor, dout: Tensor) -> None:
    for name, x in (("out", out), ("dout", dout)):
        assert x.dtype == q.dtype, f"dtype: {name} has another one than q"
        assert x.shape == q.shape, f"shape: {name} has another one than q"
        assert x.stride(-1) == 1, f"the last dimension of {name} has a stride"


def check_statistics(lse: Tensor, *shape: int) -> None:
    """The FlashAttention 2 and 3 backwards read fp32 from its address and look at nothing else."""
    assert lse.dtype == torch.float32, f"log-sum-exp of {lse.dtype}"
    assert lse.shape == shape, f"log-sum-exp of shape {tuple(lse.shape)}"
    assert lse.is_contiguous(), "log-sum-exp with strides"


def check_lengths(x: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """The lengths [sequences] of rows x [total, H, D]."""
    assert x.dim() == 3, "shape: not [total, heads, head size]"
    assert offsets.dtype == torch.int32, f"cumulated lengths of {offsets.dtype}"
    assert offsets.dim() == 1 and len(offsets) > 1 and offsets.is_contiguous(), "cumulated lengths"
    assert offsets[0] == 0 and offsets[-1] == len(x), "cumulated lengths do not cover the rows"
    sizes = offsets.diff()
    assert sizes.min() > 0, "an empty sequence"
    assert longest == int(sizes.max()), f"longest sequence: {longest}"
    return sizes


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
    sizes_q, sizes_k = check_lengths(q, cu_q, max_q), check_lengths(k, cu_k, max_k)
    assert len(sizes_q) == len(sizes_k), "cumulated lengths: not as many for keys as for queries"
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
    most_head_dim: int = 256,
) -> tuple[Tensor, Tensor]:
    check_operands(q, k, v, 1, most_head_dim)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    wide_q, wide_k, wide_v = q.float(), k.float(), v.float()
    for rows, keys, shown in varlen_masks(q, k, cu_q, cu_k, max_q, max_k, causal, left, -1):
        out[rows], lse[:, rows] = dense_forward(wide_q[rows], wide_k[keys], wide_v[keys], scale, shown)
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
    most_head_dim: int = 256,
) -> tuple[Tensor, Tensor, Tensor]:
    check_operands(q, k, v, 1, most_head_dim)
    check_output(q, out, dout)
    check_statistics(lse, q.shape[1], q.shape[0])
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    dout, q, k, v, out = (x.float() for x in (dout, q, k, v, out))
    for rows, keys, shown in varlen_masks(q, k, cu_q, cu_k, max_q, max_k, causal, left, -1):
        dq[rows], dk[keys], dv[keys] = dense_backward(
            dout[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows], scale, shown
        )
    return dq, dk, dv


def write_gradients(given: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> None:
    for place, grad in zip(given, grads, strict=True):
        assert place.dtype == grad.dtype, "dtype: a gradient has another one than its operand"
        assert place.shape == grad.shape, "shape: a gradient has another one than its operand"
        assert place.stride(-1) == 1, "the last dimension of a gradient has a stride"
        place.copy_(grad)


def aten_flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
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
    out, lse = varlen_forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, is_causal, left, scale)
    rng_state, unused = torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64)
    return out, lse, rng_state, unused, query.new_empty(0)


def aten_flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
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
        grad_out,
        query,
        key,
        value,
        out,
        logsumexp,
        cum_seq_q,
        cum_seq_k,
        max_q,
        max_k,
        is_causal,
        left,
        scale,
    )


def check_cudnn_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    assert q.dim() == k.dim() == v.dim() == 4, "shape: not [batch, heads, rows, head size]"
    check_operands(q, k, v, 1, most_head_dim=128)
    assert k.shape[2] > 1, "a single key"
    assert all(x.transpose(1, 2).is_contiguous() for x in (q, k, v)), "strides: a plan is made for others"


def top_left(q: Tensor, k: Tensor, is_causal: bool) -> Tensor:
    shown = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    return shown.tril() if is_causal else shown


statistics_dim = 4
"""The log-sum-exp is [1, H, L, 1] in torch 2.9 and newer, [1, H, L] before; both directions alike."""


def cudnn_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float,
) -> tuple[Tensor | int, ...]:
    """[1, H, L, D], causal at the top left."""
    assert (attn_bias, compute_log_sumexp, dropout_p, return_debug_mask) == (None, True, 0.0, False)
    check_cudnn_operands(query, key, value)
    q, k, v = (x[0].transpose(0, 1).float() for x in (query, key, value))
    out, lse = dense_forward(q, k, v, scale, top_left(query, key, is_causal))
    nothing = query.new_empty(0)
    return (
        out.to(query.dtype).transpose(0, 1)[None],
        lse[None] if statistics_dim == 3 else lse[None, ..., None],
        nothing,
        nothing,
        query.shape[2],
        key.shape[2],
        nothing,
        nothing,
        nothing,
    )


def cudnn_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
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
    assert philox_seed.dtype == philox_offset.dtype == torch.int64
    check_cudnn_operands(query, key, value)
    check_output(query, out, grad_out)
    assert (max_q, max_k) == (query.shape[2], key.shape[2]), f"longest sequence: {max_q}, {max_k}"
    check_statistics(logsumexp, *query.shape[:3], *(() if statistics_dim == 3 else (1,)))
    assert all(x.transpose(1, 2).is_contiguous() for x in (grad_out, out)), (
        "strides: a plan is made for others"
    )
    dout, q, k, v, o = (x[0].transpose(0, 1).float() for x in (grad_out, query, key, value, out))
    lse = logsumexp.reshape(query.shape[1:3])
    grads = dense_backward(dout, q, k, v, o, lse, scale, top_left(query, key, is_causal))
    return tuple(x.to(query.dtype).transpose(0, 1)[None] for x in grads)


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
    others = (dropout_p, window_size_right, softcap, alibi_slopes, return_softmax)
    assert others == (0.0, -1, 0.0, None, False)
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
    others = (dropout_p, window_size_right, softcap, alibi_slopes, rng_state, zero_tensors)
    assert others == (0.0, -1, 0.0, None, None, False)
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
    write_gradients((dq, dk, dv), grads)
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

FA3_OTHERS = {"window_size_right": -1, "attention_chunk": 0, "softcap": 0.0, "sm_margin": 0}


def check_fa3_others(others: dict[str, Any]) -> None:
    unlike = {name: x for name, x in others.items() if x not in (None, False) and x != FA3_OTHERS.get(name)}
    assert not unlike, unlike


def fa3_forward(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    num_splits: int,
    is_causal: bool = False,
    window_size_left: int = -1,
    **others: Any,
) -> tuple[Tensor, ...]:
    assert num_splits == 1
    check_fa3_others(others)
    assert (max_seqlen_q, max_seqlen_k).count(None) == 0, "longest sequence: must be provided"
    out, lse = varlen_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        is_causal,
        window_size_left,
        softmax_scale,
    )
    return out, lse, q.new_empty(0), q.new_empty(0)


def fa3_backward(
    *,
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
    softmax_scale: float,
    is_causal: bool = False,
    window_size_left: int = -1,
    deterministic: bool = False,
    **others: Any,
) -> tuple[Tensor, ...]:
    check_fa3_others(others)
    assert (max_seqlen_q, max_seqlen_k).count(None) == 0, "longest sequence: must be provided"
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    assert not deterministic or q.shape[-1] <= 192, f"head size {q.shape[-1]} is not deterministic"
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
        is_causal,
        window_size_left,
        softmax_scale,
    )
    write_gradients((dq, dk, dv), grads)
    return tuple(dout.new_empty(0) for _ in range(5))


def by_name(operator: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with all arguments by the names in the schema of a flash_attn_3 operator."""

    def call(*arguments: Any, **options: Any) -> Any:
        schema = getattr(torch.ops.flash_attn_3, operator).default._schema
        names = [argument.name for argument in schema.arguments]
        return function(**dict(zip(names, arguments, strict=False)), **options)

    return call


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
    *,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None, None, None, None]:
    others = (qv, seqused_q, seqused_k, min_seqlen_k, page_table, softcap, window_size_right)
    assert others == (None,) * len(others) and return_lse
    assert cu_seqlens_q is not None and max_seqlen_q is not None and softmax_scale is not None
    assert cu_seqlens_k is not None and max_seqlen_k is not None
    left = -1 if window_size_left is None else window_size_left
    # On Hopper heads may be as wide as 256; the newer GPUs take no more than this for all lengths.
    out, lse = varlen_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal,
        left,
        softmax_scale,
        most_head_dim=128,
    )
    return out, lse, None, None, None


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
    assert len(cu_seqlens_q) == len(cu_seqlens_k) == 2, "several sequences in a backward"
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
        most_head_dim=128,
    )


OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "cuda": (aten_flash_forward, aten_flash_backward),
    "cudnn": (cudnn_forward, cudnn_backward),
    "flash_attn2": (fa2_forward, fa2_backward),
    "flash_attn3": (fa3_forward, fa3_backward),
    "flash_attn4": (fa4_forward, fa4_backward),
}
"""Forward and backward of each kernel's backend, by the kernel's name."""
