"""PrefixKV: the step-0 keys and values, gathered over the ring once for all K TTT steps.

They never change over the steps, so their gradients are summed here in fp32 and reduce-scattered once. Against a ring per
step this sends 10-14 times fewer bytes for K = 7.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eagle3_ds.attention.tiles import gathered_tiles
from eagle3_ds.collectives import all_gather_rows, reduce_scatter_rows
from eagle3_ds.kernels import AttentionKernel, accumulation_dtype
from eagle3_ds.layout import SpanPlan


class PrefixKV:
    """All keys and values of this rank's heads, in sequence order.

    Attributes:
        k, v: [padded_length, heads / ulysses, D].
        dk, dv: their gradients, fp32 (fp64 for fp64), filled by the backward of the K steps.
        ticket: a scalar that ties the K steps to the gather in the autograd graph. Gradients travel in `dk` and `dv`,
            because autograd would sum them in the keys' own dtype; the ticket only makes the gather's backward run last.
    """

    def __init__(
        self,
        k_heads: Tensor,
        v_heads: Tensor,
        plan: SpanPlan,
        ring_rank: int,
        ring_group: dist.ProcessGroup | None,
        kernel: AttentionKernel,
    ) -> None:
        """Gather the ring. k_heads, v_heads: [columns_per_ring_rank, heads / ulysses, D] of this ring rank."""
        self.kernel = kernel
        self.tiles = gathered_tiles(plan, ring_rank)
        self.k: Tensor
        self.v: Tensor
        self.dk: Tensor | None = None
        self.dv: Tensor | None = None
        self.ticket: Tensor = _GatherKV.apply(k_heads, v_heads, self, plan, ring_group)

    def attend(self, q_heads: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Step-0 attention of this ring rank's columns. q [Lr, Hq / ulysses, D] -> out, lse [Lr, Hq / ulysses]."""
        return self.kernel.forward(q_heads, self.k, self.v, self.tiles, scale)

    def attend_backward(self, dout: Tensor, q_heads: Tensor, lse: Tensor, delta: Tensor, scale: float) -> Tensor:
        """dq of `attend` under the merged lse and delta; adds to `dk` and `dv`."""
        if self.dk is None or self.dv is None:
            dtype = accumulation_dtype(self.k.dtype)
            self.dk, self.dv = torch.zeros_like(self.k, dtype=dtype), torch.zeros_like(self.v, dtype=dtype)
        return self.kernel.backward(dout, q_heads, self.k, self.v, lse, delta, self.tiles, scale, self.dk, self.dv)


class _GatherKV(torch.autograd.Function):
    """Forward: all-gather of k and v over the ring, in one call. Backward: reduce-scatter of dk and dv, in one call."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, prefix: PrefixKV, plan: SpanPlan, group: dist.ProcessGroup | None) -> Tensor:
        ctx.prefix, ctx.plan, ctx.group, ctx.dtype = prefix, plan, group, k.dtype
        kv = torch.cat((k, v), dim=-1)
        if plan.ring > 1:
            order = torch.from_numpy(plan.sequence_order).to(kv.device)
            kv = all_gather_rows(kv, group)[order]
        gathered_k, gathered_v = kv.chunk(2, dim=-1)
        prefix.k, prefix.v = gathered_k.contiguous(), gathered_v.contiguous()
        return k.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _ticket: Tensor) -> tuple[Tensor | None, ...]:
        prefix: PrefixKV = ctx.prefix
        assert prefix.dk is not None and prefix.dv is not None, "the gather's backward ran before any step's"
        dkv = torch.cat((prefix.dk, prefix.dv), dim=-1)
        prefix.dk = prefix.dv = None
        if ctx.plan.ring > 1:
            by_rank = torch.from_numpy(ctx.plan.ring_slots.reshape(-1)).to(dkv.device)
            dkv = reduce_scatter_rows(dkv[by_rank], ctx.group)
        dk, dv = dkv.to(ctx.dtype).chunk(2, dim=-1)
        return dk, dv, None, None, None
