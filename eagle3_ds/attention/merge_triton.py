"""The merge of the diagonal keys on CUDA: one Triton kernel forward, one backward, each reading every operand
once. The formulas are those of merge.py.

A program handles a few slots and the query heads of one key head, in fp32. The forward accumulates the
softmax online over the diagonals, beginning with the step-0 attention: m = lse0, l = 1, o = out0, and then
for each diagonal of score z and value v

    m' = max(m, z)        l' = exp(m - m') l + exp(z - m')        o' = exp(m - m') o + exp(z - m') v

with out = o / l and lse = m + log l in the end.

Legend: B slots of one program, G query heads per key head, D head size; G and D padded to a power of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a [B, G, D] operand in one program: the backward holds three in registers.
_PROGRAM_ELEMENTS = 2048


def fused_merge(
    out0: Tensor, lse0: Tensor, q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """`merge.merge_diagonals` on a CUDA device, for at least one diagonal: out0, q [S, Hq, D], lse0 [S, Hq],
    keys, values [S, N, D] -> out [S, Hq, D], lse [S, Hq].
    """
    q, out0, lse0 = q.contiguous(), out0.contiguous(), lse0.contiguous()
    out, lse = torch.empty_like(q), torch.empty_like(lse0)
    grid, sizes = _launch(q, keys[0])
    _merge_kernel[grid](
        out0, lse0, q, _contiguous(keys), _contiguous(values), out, lse, len(q), scale, **sizes
    )
    return out, lse


def fused_merge_backward(
    dout: Tensor,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    lse: Tensor,
    delta: Tensor,
    scale: float,
    dkeys: Sequence[Tensor],
    dvalues: Sequence[Tensor],
) -> Tensor:
    """`merge.merge_diagonals_backward` on a CUDA device: dout, q [S, Hq, D], keys, values, dkeys, dvalues
    [S, N, D], lse, delta [S, Hq] -> dq [S, Hq, D]. dkeys and dvalues are contiguous.
    """
    assert all(x.is_contiguous() for x in (*dkeys, *dvalues))
    dout, q, lse, delta = (x.contiguous() for x in (dout, q, lse, delta))
    dq = torch.empty_like(q)
    grid, sizes = _launch(q, keys[0])
    _merge_backward_kernel[grid](
        dout,
        q,
        _contiguous(keys),
        _contiguous(values),
        lse,
        delta,
        dq,
        tuple(dkeys),
        tuple(dvalues),
        len(q),
        scale,
        **sizes,
    )
    return dq


def _contiguous(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in tensors)


def _launch(q: Tensor, key: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid (blocks of slots x key heads), and the sizes that the kernels are compiled for.

    q [S, Hq, D], key [S, N, D].
    """
    num_slots, num_heads, head_dim = q.shape
    num_kv_heads = key.shape[1]
    group = num_heads // num_kv_heads
    padded_group, padded_dim = triton.next_power_of_2(group), triton.next_power_of_2(head_dim)
    block = max(1, _PROGRAM_ELEMENTS // (padded_group * padded_dim))
    sizes = {
        "num_kv_heads": num_kv_heads,
        "group": group,
        "head_dim": head_dim,
        "BLOCK": block,
        "GROUP": padded_group,
        "DIM": padded_dim,
        "num_warps": 4 if block * padded_group * padded_dim <= 2 * _PROGRAM_ELEMENTS else 8,
    }
    return (triton.cdiv(num_slots, block), num_kv_heads), sizes


@triton.jit
def _places(
    num_slots: tl.tensor,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
) -> tl.tuple:
    """Offsets and masks of this program's statistics [B, G], of query-like rows [B, G, D] and of key-like
    rows [B, D].
    """
    kv_head = tl.program_id(1)
    # int64, because a million slots of 32 heads of 128 have more elements than int32 can count.
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    member = tl.arange(0, GROUP)
    dim = tl.arange(0, DIM)
    heads = (slot[:, None] * num_kv_heads + kv_head) * group + member[None, :]
    heads_mask = (slot[:, None] < num_slots) & (member[None, :] < group)
    rows = heads[:, :, None] * head_dim + dim[None, None, :]
    rows_mask = heads_mask[:, :, None] & (dim[None, None, :] < head_dim)
    keys = (slot[:, None] * num_kv_heads + kv_head) * head_dim + dim[None, :]
    keys_mask = (slot[:, None] < num_slots) & (dim[None, :] < head_dim)
    return heads, heads_mask, rows, rows_mask, keys, keys_mask


@triton.jit
def _merge_kernel(
    out0_ptr: tl.tensor,
    lse0_ptr: tl.tensor,
    q_ptr: tl.tensor,
    key_ptrs: tl.tuple,
    value_ptrs: tl.tuple,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    num_slots: tl.tensor,
    scale: tl.tensor,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    heads, heads_mask, rows, rows_mask, keys, keys_mask = _places(
        num_slots, num_kv_heads, group, head_dim, BLOCK, GROUP, DIM
    )
    q_BGD = tl.load(q_ptr + rows, rows_mask, other=0.0).to(tl.float32)
    merged_BGD = tl.load(out0_ptr + rows, rows_mask, other=0.0).to(tl.float32)
    # lse0 is -inf for padding; the first diagonal makes m finite, so that no (-inf) - (-inf) occurs.
    best_BG = tl.load(lse0_ptr + heads, heads_mask, other=0.0)
    total_BG = tl.full((BLOCK, GROUP), 1.0, tl.float32)
    for i in tl.static_range(len(key_ptrs)):
        k_BD = tl.load(key_ptrs[i] + keys, keys_mask, other=0.0).to(tl.float32)
        v_BD = tl.load(value_ptrs[i] + keys, keys_mask, other=0.0).to(tl.float32)
        score_BG = tl.sum(q_BGD * k_BD[:, None, :], axis=2) * scale
        new_best_BG = tl.maximum(best_BG, score_BG)
        shrink_BG = tl.exp(best_BG - new_best_BG)
        p_BG = tl.exp(score_BG - new_best_BG)
        total_BG = total_BG * shrink_BG + p_BG
        merged_BGD = merged_BGD * shrink_BG[:, :, None] + p_BG[:, :, None] * v_BD[:, None, :]
        best_BG = new_best_BG
    tl.store(out_ptr + rows, (merged_BGD / total_BG[:, :, None]).to(out_ptr.dtype.element_ty), rows_mask)
    tl.store(lse_ptr + heads, best_BG + tl.log(total_BG), heads_mask)


@triton.jit
def _merge_backward_kernel(
    dout_ptr: tl.tensor,
    q_ptr: tl.tensor,
    key_ptrs: tl.tuple,
    value_ptrs: tl.tuple,
    lse_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    dq_ptr: tl.tensor,
    dkey_ptrs: tl.tuple,
    dvalue_ptrs: tl.tuple,
    num_slots: tl.tensor,
    scale: tl.tensor,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    heads, heads_mask, rows, rows_mask, keys, keys_mask = _places(
        num_slots, num_kv_heads, group, head_dim, BLOCK, GROUP, DIM
    )
    q_BGD = tl.load(q_ptr + rows, rows_mask, other=0.0).to(tl.float32)
    dout_BGD = tl.load(dout_ptr + rows, rows_mask, other=0.0).to(tl.float32)
    lse_BG = tl.load(lse_ptr + heads, heads_mask, other=0.0)
    delta_BG = tl.load(delta_ptr + heads, heads_mask, other=0.0)
    dq_BGD = tl.zeros((BLOCK, GROUP, DIM), tl.float32)
    for i in tl.static_range(len(key_ptrs)):
        k_BD = tl.load(key_ptrs[i] + keys, keys_mask, other=0.0).to(tl.float32)
        v_BD = tl.load(value_ptrs[i] + keys, keys_mask, other=0.0).to(tl.float32)
        p_BG = tl.exp(tl.sum(q_BGD * k_BD[:, None, :], axis=2) * scale - lse_BG)
        ds_BG = p_BG * (tl.sum(dout_BGD * v_BD[:, None, :], axis=2) - delta_BG) * scale
        dq_BGD += ds_BG[:, :, None] * k_BD[:, None, :]
        # The padding of G loads zeros as q and dout, and so adds nothing to these sums.
        dk_BD = tl.sum(ds_BG[:, :, None] * q_BGD, axis=1)
        dv_BD = tl.sum(p_BG[:, :, None] * dout_BGD, axis=1)
        dk_BD += tl.load(dkey_ptrs[i] + keys, keys_mask, other=0.0).to(tl.float32)
        dv_BD += tl.load(dvalue_ptrs[i] + keys, keys_mask, other=0.0).to(tl.float32)
        tl.store(dkey_ptrs[i] + keys, dk_BD.to(dkey_ptrs[i].dtype.element_ty), keys_mask)
        tl.store(dvalue_ptrs[i] + keys, dv_BD.to(dvalue_ptrs[i].dtype.element_ty), keys_mask)
    tl.store(dq_ptr + rows, dq_BGD.to(dq_ptr.dtype.element_ty), rows_mask)
