"""The point-to-point ring: for lengths where the gathered keys and values of a whole sequence would not fit.

Blocks of keys and values travel around the ring at every step, double-buffered: the next block is on its way while this
one is computed. The mask is "hybrid": which tile of a block is full, causal or absent comes from the span plan, so any
chunk-to-rank map works (Liu et al., Ring Attention, 2023, with the causal balance moved into the plan).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eagle3_ds.attention.tiles import block_tiles
from eagle3_ds.collectives import RingExchange
from eagle3_ds.kernels import AttentionKernel, accumulation_dtype, merge_partial
from eagle3_ds.layout import SpanPlan


def ring_attention_hybrid_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SpanPlan,
    ring_rank: int,
    ring_group: dist.ProcessGroup | None,
    kernel: AttentionKernel,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Packed causal attention over the ring, forward only (`RingKV` holds the gradient).

    Args:
        q: [Lr, Hq, D], k, v: [Lr, Hkv, D], this ring rank's columns.

    Returns:
        out [Lr, Hq, D] in fp32 (fp64 for fp64), lse [Lr, Hq]; rows of padding are zero with lse -inf.
    """
    dtype = accumulation_dtype(q.dtype)
    out = torch.zeros_like(q, dtype=dtype)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)
    exchange = RingExchange(ring_group)
    block = [k, v]
    for hop in range(plan.ring):
        pending = exchange.start(block) if hop + 1 < plan.ring else None
        tiles = block_tiles(plan, ring_rank, (ring_rank - hop) % plan.ring)
        part, part_lse = kernel.forward(q, block[0], block[1], tiles, scale)
        out, lse = merge_partial(out, lse, part, part_lse)
        if pending is not None:
            block = pending.wait()
    return out, lse


def ring_attention_hybrid_masked_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    plan: SpanPlan,
    ring_rank: int,
    ring_group: dist.ProcessGroup | None,
    kernel: AttentionKernel,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the ring under a merged lse and delta. The gradient of a block travels with it and comes home last."""
    dtype = accumulation_dtype(q.dtype)
    dq = torch.zeros_like(q, dtype=dtype)
    dk, dv = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
    exchange = RingExchange(ring_group)
    block = [k, v]
    for hop in range(plan.ring):
        pending = exchange.start(block) if hop + 1 < plan.ring else None
        tiles = block_tiles(plan, ring_rank, (ring_rank - hop) % plan.ring)
        dq += kernel.backward(dout, q, block[0], block[1], lse, delta, tiles, scale, dk, dv)
        if pending is not None:
            block = pending.wait()
        if plan.ring > 1:
            dk, dv = exchange.start([dk, dv]).wait()
    return dq, dk, dv


class RingKV:
    """The second strategy behind the interface of `PrefixKV`: holds this ring rank's block and streams the others."""

    def __init__(
        self,
        k_heads: Tensor,
        v_heads: Tensor,
        plan: SpanPlan,
        ring_rank: int,
        ring_group: dist.ProcessGroup | None,
        kernel: AttentionKernel,
    ) -> None:
        self.k, self.v = k_heads.detach(), v_heads.detach()
        self.plan, self.ring_rank, self.ring_group, self.kernel = plan, ring_rank, ring_group, kernel
        self.dk: Tensor | None = None
        self.dv: Tensor | None = None
        self.ticket: Tensor = _KeepKV.apply(k_heads, v_heads, self)

    def attend(self, q_heads: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return ring_attention_hybrid_masked(
            q_heads, self.k, self.v, self.plan, self.ring_rank, self.ring_group, self.kernel, scale
        )

    def attend_backward(self, dout: Tensor, q_heads: Tensor, lse: Tensor, delta: Tensor, scale: float) -> Tensor:
        dq, dk, dv = ring_attention_hybrid_masked_backward(
            dout, q_heads, self.k, self.v, lse, delta, self.plan, self.ring_rank, self.ring_group, self.kernel, scale
        )
        self.dk = dk if self.dk is None else self.dk + dk
        self.dv = dv if self.dv is None else self.dv + dv
        return dq


class _KeepKV(torch.autograd.Function):
    """Forward: nothing moves. Backward: hands out the gradients that the K steps summed in fp32."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, ring_kv: RingKV) -> Tensor:
        ctx.ring_kv, ctx.dtype = ring_kv, k.dtype
        return k.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _ticket: Tensor) -> tuple[Tensor | None, ...]:
        kept: RingKV = ctx.ring_kv
        assert kept.dk is not None and kept.dv is not None, "the backward of the kept block ran before any step's"
        dk, dv = kept.dk.to(ctx.dtype), kept.dv.to(ctx.dtype)
        kept.dk = kept.dv = None
        return dk, dv, None
