"""Soft cross entropy on CUDA in one Triton kernel. The formulas are those of kl.py, the gradient weighted:

    lse = log sum_v exp z_v        value = lse - sum_v p_v z_v        dz = w (q - p)
    q = exp(z - lse)               acceptance = max(0, 1 - 1/2 sum_v |q_v - p_v|)

A program has one column. It reads the column twice, blocks of the vocabulary after another: for the sums that
the softmax needs, online, and for the gradient, when most of it is still in the cache. Everything is computed
in fp32. Torch takes eleven passes over fp32 tensors for the same.

Legend: t columns of a tile, V draft vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eagle3_ds.draft.tile_loss import WeightedTerms

_LARGEST_BLOCK = 4096


def fused_kl(logits: Tensor, target: Tensor, weight: Tensor, gradient: Tensor | None) -> WeightedTerms:
    """`tile_loss.weighted_terms` of `kl` on a CUDA device: logits [t, V], target fp32 [t, V], weight fp32
    [t], gradient [t, V] or None; rows may lie apart.
    """
    columns, vocabulary = logits.shape
    assert logits.stride(1) == target.stride(1) == 1
    assert gradient is None or gradient.stride(1) == 1
    value, acceptance = (torch.empty(columns, dtype=torch.float32, device=logits.device) for _ in range(2))
    best = torch.empty(columns, dtype=torch.int64, device=logits.device)
    if columns:
        _kl_kernel[(columns,)](
            logits,
            target,
            weight.contiguous(),
            logits if gradient is None else gradient,
            value,
            acceptance,
            best,
            vocabulary,
            logits.stride(0),
            target.stride(0),
            0 if gradient is None else gradient.stride(0),
            WITH_GRADIENT=gradient is not None,
            BLOCK=min(_LARGEST_BLOCK, triton.next_power_of_2(vocabulary)),
            num_warps=8,
        )
    return WeightedTerms(value, acceptance, best)


@triton.jit
def _kl_kernel(
    logits_ptr: tl.tensor,
    target_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    gradient_ptr: tl.tensor,
    value_ptr: tl.tensor,
    acceptance_ptr: tl.tensor,
    best_ptr: tl.tensor,
    vocabulary: tl.tensor,
    logits_stride: tl.tensor,
    target_stride: tl.tensor,
    gradient_stride: tl.tensor,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # int64, because a tile may have more entries than int32 can count.
    column = tl.program_id(0).to(tl.int64)
    logits_ptr += column * logits_stride
    target_ptr += column * target_stride
    gradient_ptr += column * gradient_stride
    offset = tl.arange(0, BLOCK)
    largest = -float("inf")
    best = 0
    total = 0.0
    product = 0.0
    for start in range(0, vocabulary, BLOCK):
        inside = start + offset < vocabulary
        z = tl.load(logits_ptr + start + offset, inside, other=-float("inf")).to(tl.float32)
        p = tl.load(target_ptr + start + offset, inside, other=0.0)
        block_largest, block_best = tl.max(z, axis=0), tl.argmax(z, axis=0, tie_break_left=True)
        # Only a larger one: of equals the first counts.
        best = tl.where(block_largest > largest, start + block_best, best)
        new_largest = tl.maximum(largest, block_largest)
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(z - new_largest))
        # Outside, 0 times -inf would be no number.
        product += tl.sum(tl.where(inside, p * z, 0.0))
        largest = new_largest
    lse = largest + tl.log(total)
    weight = tl.load(weight_ptr + column)
    distance = 0.0
    for start in range(0, vocabulary, BLOCK):
        inside = start + offset < vocabulary
        z = tl.load(logits_ptr + start + offset, inside, other=-float("inf")).to(tl.float32)
        difference = tl.exp(z - lse) - tl.load(target_ptr + start + offset, inside, other=0.0)
        distance += tl.sum(tl.abs(difference))
        if WITH_GRADIENT:
            dz = (difference * weight).to(gradient_ptr.dtype.element_ty)
            tl.store(gradient_ptr + start + offset, dz, inside)
    tl.store(value_ptr + column, lse - product)
    tl.store(acceptance_ptr + column, tl.maximum(1 - 0.5 * distance, 0.0))
    tl.store(best_ptr + column, best)
