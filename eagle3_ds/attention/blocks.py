"""The attention of blocks: every input of an anchor's block sees the context up to the anchor, and the inputs
of its own block (docs/dflash.md). One layer, forward and backward.

The context is exchanged as EAGLE-3's step-0 keys are (exchange.py): Ulysses inside, ring outside, once. To
it a block's B inputs are further query heads of the same key heads, in the order (key head, input, head of
the group), so Ulysses cuts between key heads. The block's own keys stay at home: its B x B scores are merged
with the context's (out0, lse0) under one softmax.

    z_0 = lse0        z_c = scale * q . k_c  (c: inputs that are seen)        lse = log(e^z_0 + sum_c e^z_c)
    p = exp(z - lse)  out = p_0 out0 + sum_c p_c v_c

Backward, with delta = rowsum(dout * out) of the merged output:

    dz_c = p_c (dout . v_c - delta)        dv_c = sum p_c dout
    dq = scale * sum_c dz_c k_c            dk_c = scale * sum dz_c q

where the sums of dv_c and dk_c run over the queries of the block and of the key head's group. The context's
part of dq, and its keys' and values' gradients, come from the kernel, which gets the merged lse and delta.

With a window of w, input b of the block of slot i sees the context keys j with i + 1 + b - j < w. That is
the mask of EAGLE-3's TTT step b + 1, so each input is a call of its own.

Legend: S slots of this rank, the first Q of them anchors (live slots), B inputs of a block; Hq = N * G query
heads, N key heads, D head size; I = B * G queries of a block and a key head; u Ulysses ranks, Lq = Q * u.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from eagle3_ds.attention.exchange import KVExchange
from eagle3_ds.attention.usp import LlamaUSPFlashAttention, pack_heads, unpack_heads
from eagle3_ds.collectives import all_heads_to_sequence, all_sequence_to_heads, start_sequence_to_heads
from eagle3_ds.kernels import FoldedKernel, accumulation_dtype
from eagle3_ds.layout import SpanPlan
from eagle3_ds.parts import ATTENTION, marked

_TILE_BYTES = 2**23
"""Bytes of the scores of some blocks with their own inputs: small beside the operands."""


def attend_blocks(
    attention: LlamaUSPFlashAttention,
    q: Tensor,
    context: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    plan: SpanPlan,
    ring_rank: int,
    causal: bool,
) -> Tensor:
    """The attention of all blocks of a rank, with autograd. Collective over the sp group.

    Args:
        attention: of the layer; its window, exchange and groups are used.
        q: [Q, B, Hq, D], rotated, and normed where the layer norms.
        context: keys and values of this rank's slots, [S, N, D] each.
        own: keys and values of the blocks' inputs, [Q, B, N, D] each.
        plan, ring_rank: the cut of the sequence, and this rank's part of it.
        causal: an input sees those of its block up to itself, instead of all.

    Returns:
        [Q, B, Hq * D].
    """
    inputs, heads = own[0].shape[1:3]
    wide = q.unflatten(2, (heads, -1)).transpose(1, 2).flatten(1, 3)
    out = _AttendBlocks.apply(wide, *context, *own, attention, plan, ring_rank, causal)
    return out.unflatten(1, (heads, inputs, -1)).transpose(1, 2).flatten(2)


class _AttendBlocks(torch.autograd.Function):
    """Forward: the formulas above, for q [Q, N * I, D] -> out [Q, N * I, D]. Backward: theirs."""

    @staticmethod
    @marked(ATTENTION)
    def forward(
        ctx: Any,
        q: Tensor,
        k_context: Tensor,
        v_context: Tensor,
        k_own: Tensor,
        v_own: Tensor,
        attention: LlamaUSPFlashAttention,
        plan: SpanPlan,
        ring_rank: int,
        causal: bool,
    ) -> Tensor:
        group = attention.ulysses_group
        q_heads, k_heads, v_heads = all_sequence_to_heads((q, k_context, v_context), group)
        kernel = FoldedKernel(attention.kernel)
        exchange = attention.exchange(k_heads, v_heads, plan, ring_rank, kernel)
        context = _Context(exchange, attention, k_own.shape[1:3])
        out_heads, lse_heads = context.attend(q_heads)
        out0, lse0 = attention.home_with_statistics(out_heads.to(q.dtype), lse_heads)
        out, lse = merge_block(out0, lse0, q, k_own, v_own, attention.scale, causal)
        ctx.attention, ctx.context, ctx.causal = attention, context, causal
        ctx.save_for_backward(q, k_own, v_own, out, lse)
        return out

    @staticmethod
    @marked(ATTENTION)
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k_own, v_own, out, lse = ctx.saved_tensors
        group, scale = ctx.attention.ulysses_group, ctx.attention.scale
        dtype = accumulation_dtype(out.dtype)
        delta = (dout.to(dtype) * out.to(dtype)).sum(-1)
        sent, statistics = (dout.contiguous(), q), (lse, delta)
        # This exchange runs while the blocks' own keys are computed.
        pending = start_sequence_to_heads(pack_heads(sent, statistics), group) if group else None
        dq, dk_own, dv_own = merge_block_backward(dout, q, k_own, v_own, lse, delta, scale, ctx.causal)
        arrived = [*sent, *statistics] if pending is None else unpack_heads(pending.wait(), sent, statistics)
        del pending
        context: _Context = ctx.context
        gradients = (context.attend_backward(*arrived), *context.exchange.take_gradients())
        dq_context, dk, dv = all_heads_to_sequence([x.to(q.dtype) for x in gradients], group)
        return dq + dq_context, dk, dv, dk_own, dv_own, None, None, None, None


class _Context:
    """The exchanged context of one layer, and its attention, in heads layout.

    Args:
        exchange: made of the context's keys and values.
        block: B, and the N key heads of all Ulysses ranks together.
    """

    def __init__(self, exchange: KVExchange, attention: LlamaUSPFlashAttention, block: Sequence[int]) -> None:
        self.exchange, self.scale, self.window = exchange, attention.scale, attention.window
        self.inputs, self.heads = block[0], block[1] // attention.sp_ulysses_degree

    def attend(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """q [Lq, N / u * I, D] -> out of that shape, lse [Lq, N / u * I]."""
        if self.window is None:
            return self.exchange.attend(q, self.scale)
        found = [
            self.exchange.attend(part, self.scale, step) for step, part in enumerate(self._inputs_of(q), 1)
        ]
        out, lse = (self._joined(parts) for parts in zip(*found, strict=True))
        return out, lse

    def attend_backward(self, dout: Tensor, q: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
        """dq [Lq, N / u * I, D]; the exchange keeps the sums of dk and dv."""
        if self.window is None:
            return self.exchange.attend_backward(dout, q, lse, delta, self.scale)
        by_input = zip(*(self._inputs_of(x) for x in (dout, q, lse, delta)), strict=True)
        found = [
            self.exchange.attend_backward(dout_b, q_b, lse_b, delta_b, self.scale, step)
            for step, (dout_b, q_b, lse_b, delta_b) in enumerate(by_input, 1)
        ]
        return self._joined(found)

    def _inputs_of(self, x: Tensor) -> list[Tensor]:
        """x [Lq, N / u * I, ...] -> of each input [Lq, N / u * G, ...]. Input b has the window of TTT step
        b + 1.
        """
        split = x.unflatten(1, (self.heads, self.inputs, -1))
        return [split[:, :, index].flatten(1, 2).contiguous() for index in range(self.inputs)]

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `_inputs_of`."""
        return torch.stack([x.unflatten(1, (self.heads, -1)) for x in parts], dim=2).flatten(1, 3)


def merge_block(
    out0: Tensor, lse0: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Add the keys of a block, seen by its own inputs alone, to the attention over the context.

    Args:
        out0: [Q, N * I, D], over the context; lse0: [Q, N * I], fp32 (fp64 for fp64).
        q: [Q, N * I, D]; k, v: [Q, B, N, D].

    Returns:
        The merged output [Q, N * I, D] in the dtype of q, and its log-sum-exp [Q, N * I] in that of lse0.
    """
    out, lse = torch.empty_like(q), torch.empty_like(lse0)
    for rows in _tiles(q, k):
        scores_NIC = _scores(q[rows], k[rows], scale, causal)
        lse0_NI, out0_NID = (x[rows].unflatten(1, scores_NIC.shape[1:3]) for x in (lse0, out0))
        lse_NI = torch.logaddexp(scores_NIC.logsumexp(-1), lse0_NI)
        weights_NIC = scores_NIC.sub_(lse_NI[..., None]).exp_()
        merged = weights_NIC @ v[rows].transpose(1, 2).to(weights_NIC.dtype)
        merged.addcmul_(out0_NID, (lse0_NI - lse_NI).exp_()[..., None])
        out[rows], lse[rows] = merged.flatten(1, 2), lse_NI.flatten(1, 2)
    return out, lse


def merge_block_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [Q, N * I, D], k and v [Q, B, N, D], through the block's own scores only.

    Args:
        dout: [Q, N * I, D], of the merged output; q, k, v, scale, causal: as in `merge_block`.
        lse: merged; delta: row sum of dout * merged output. [Q, N * I], fp32 (fp64 for fp64).
    """
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for rows in _tiles(q, k):
        p_NIC = _scores(q[rows], k[rows], scale, causal)
        dtype, queries = p_NIC.dtype, p_NIC.shape[1:3]
        p_NIC.sub_(lse[rows].unflatten(1, queries)[..., None]).exp_()
        q_NID, dout_NID = (x[rows].unflatten(1, queries).to(dtype) for x in (q, dout))
        k_NCD, v_NCD = (x[rows].transpose(1, 2).to(dtype) for x in (k, v))
        # scale * dz: both dq and dk carry the factor.
        ds_NIC = (dout_NID @ v_NCD.mT).sub_(delta[rows].unflatten(1, queries)[..., None])
        ds_NIC.mul_(p_NIC).mul_(scale)
        dq[rows] = (ds_NIC @ k_NCD).flatten(1, 2)
        dk[rows], dv[rows] = ((x.mT @ y).transpose(1, 2) for x, y in ((ds_NIC, q_NID), (p_NIC, dout_NID)))
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """scale * q . k of q [n, N * I, D] and k [n, B, N, D] -> [n, N, I, B] in at least fp32, -inf where an
    input is not seen.
    """
    inputs, heads = k.shape[1:3]
    dtype = accumulation_dtype(q.dtype)
    scores = q.unflatten(1, (heads, -1)).to(dtype) @ k.transpose(1, 2).to(dtype).mT
    scores.mul_(scale)
    if causal:
        of_query = torch.arange(scores.shape[2], device=q.device) // (scores.shape[2] // inputs)
        ahead = torch.arange(inputs, device=q.device) > of_query[:, None]
        scores.masked_fill_(ahead, -torch.inf)
    return scores


def _tiles(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Stretches of anchors whose scores with their own blocks fit `_TILE_BYTES`."""
    itemsize = torch.finfo(accumulation_dtype(q.dtype)).bits // 8
    size = max(1, _TILE_BYTES // (q.shape[1] * k.shape[1] * itemsize))
    for start in range(0, len(q), size):
        yield slice(start, min(start + size, len(q)))
