"""The USP attention of one draft layer over the K TTT steps (DESIGN: Ulysses inside, ring outside).

Step 0 sends q, k and v in one all-to-all, then exchanges the keys and values over the ring once. Steps >= 1 send q and
receive (out, lse): their own keys are diagonal, seen by their own slot alone, and never leave the rank.

Legend: S slots of this rank, Lr = S * ulysses columns of this ring rank, Hq / Hkv heads, D head size.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eagle3_ds.attention.merge import merge_diagonals, merge_diagonals_backward
from eagle3_ds.attention.prefix_kv import PrefixKV
from eagle3_ds.attention.ring import RingKV
from eagle3_ds.collectives import SequenceToHeads, heads_to_sequence, sequence_to_heads
from eagle3_ds.kernels import AttentionKernel, accumulation_dtype
from eagle3_ds.layout import SpanPlan


class UnrollMemory:
    """What one layer remembers over the steps of one unroll: the step-0 keys and values, and the diagonals since."""

    def __init__(self, plan: SpanPlan, ring_rank: int) -> None:
        self.plan, self.ring_rank = plan, ring_rank
        self.prefix: PrefixKV | RingKV | None = None
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []


class LlamaUSPFlashAttention(nn.Module):
    """Takes the place of a draft layer's attention. Parameter names stay: the projections are the replaced module's own.

    Attributes:
        sp_ring_degree, sp_ulysses_degree, sp_world_size, sp_rank: the mesh, as RFC 338 names it.
    """

    def __init__(
        self,
        attention: Any,
        kernel: AttentionKernel,
        ulysses_group: dist.ProcessGroup | None = None,
        ring_group: dist.ProcessGroup | None = None,
        kv_exchange: Literal["gather", "ring"] = "gather",
    ) -> None:
        super().__init__()
        self.q_proj: nn.Module = attention.q_proj
        self.k_proj: nn.Module = attention.k_proj
        self.v_proj: nn.Module = attention.v_proj
        self.o_proj: nn.Module = attention.o_proj
        self.head_dim: int = attention.head_dim
        self.scale = self.head_dim**-0.5
        self.kernel, self.kv_exchange = kernel, kv_exchange
        self.ulysses_group, self.ring_group = ulysses_group, ring_group
        self.sp_ulysses_degree = ulysses_group.size() if ulysses_group else 1
        self.sp_ring_degree = ring_group.size() if ring_group else 1
        self.sp_world_size = self.sp_ring_degree * self.sp_ulysses_degree
        ring_rank = ring_group.rank() if ring_group else 0
        self.sp_rank = ring_rank * self.sp_ulysses_degree + (ulysses_group.rank() if ulysses_group else 0)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [S, 2H] (or [S, H]), cos and sin [S, D] -> rotated q [S, Hq, D], rotated k and v [S, Hkv, D]."""
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, memory: UnrollMemory) -> Tensor:
        """The attention of one TTT step, [S, Hq * D]; the step is how often `memory` has been here before."""
        if memory.prefix is None:
            q_heads, k_heads, v_heads = self._exchange_qkv(q, k, v)
            strategy = PrefixKV if self.kv_exchange == "gather" else RingKV
            memory.prefix = strategy(k_heads, v_heads, memory.plan, memory.ring_rank, self.ring_group, self.kernel)
        else:
            memory.keys.append(k)
            memory.values.append(v)
            q_heads = SequenceToHeads.apply(q, self.ulysses_group)
        prefix = memory.prefix
        out = _HybridAttention.apply(
            q_heads, q, prefix.ticket, prefix, self.ulysses_group, self.scale, *memory.keys, *memory.values
        )
        return out.flatten(1)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, memory: UnrollMemory) -> Tensor:
        return self.o_proj(self.attend(*self.project(x, cos, sin), memory))

    def _exchange_qkv(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One all-to-all for all three: each destination's query, key and value heads lie side by side."""
        ulysses = self.sp_ulysses_degree
        if ulysses == 1:
            return q, k, v
        parts = [x.unflatten(1, (ulysses, -1)) for x in (q, k, v)]
        sizes = [part.shape[2] for part in parts]
        heads = SequenceToHeads.apply(torch.cat(parts, dim=2).flatten(1, 2), self.ulysses_group)
        q_heads, k_heads, v_heads = heads.split(sizes, dim=1)
        return q_heads.contiguous(), k_heads, v_heads


def rotate(x_SHD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Rotary embedding in the half-split convention of Llama, computed in the dtype of cos (fp32), returned in x's."""
    x = x_SHD.to(torch.promote_types(cos_SD.dtype, x_SHD.dtype))
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos_SD[:, None] + turned * sin_SD[:, None]).to(x_SHD.dtype)


class _HybridAttention(torch.autograd.Function):
    """Forward: step-0 attention in heads layout, (out, lse) home in one all-to-all, diagonals merged there.

    Backward: (dout, lse, delta) out in one all-to-all; the step-0 part of dq stays in heads layout, and the conjugate of
    q's own exchange brings it home.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_heads: Tensor,
        q: Tensor,
        ticket: Tensor,
        prefix: PrefixKV | RingKV,
        group: dist.ProcessGroup | None,
        scale: float,
        *diagonals: Tensor,
    ) -> Tensor:
        half = len(diagonals) // 2
        out_heads, lse_heads = prefix.attend(q_heads, scale)
        out0, (lse0,) = _with_statistics(heads_to_sequence, out_heads.to(q.dtype), (lse_heads,), group)
        out, lse = merge_diagonals(out0, lse0, q, diagonals[:half], diagonals[half:], scale)
        ctx.save_for_backward(q_heads, q if half else None, out, lse, *diagonals)
        ctx.prefix, ctx.group, ctx.scale = prefix, group, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q_heads, q, out, lse, *diagonals = ctx.saved_tensors
        half = len(diagonals) // 2
        dtype = accumulation_dtype(out.dtype)
        delta = (dout.to(dtype) * out.to(dtype)).sum(-1)
        dq: Tensor | None = None
        dkeys: list[Tensor] = []
        dvalues: list[Tensor] = []
        if half:
            dq, dkeys, dvalues = merge_diagonals_backward(dout, q, diagonals[:half], diagonals[half:], lse, delta, ctx.scale)
        dout_heads, (lse_heads, delta_heads) = _with_statistics(sequence_to_heads, dout, (lse, delta), ctx.group)
        dq_heads = ctx.prefix.attend_backward(dout_heads, q_heads, lse_heads, delta_heads, ctx.scale)
        ticket = lse.new_zeros((), dtype=torch.float32)
        return dq_heads.to(q_heads.dtype), dq, ticket, None, None, None, *dkeys, *dvalues


def _with_statistics(
    exchange: Any, x: Tensor, statistics: tuple[Tensor, ...], group: dist.ProcessGroup | None
) -> tuple[Tensor, list[Tensor]]:
    """Exchange x [rows, heads, D] together with fp32 (or fp64) statistics [rows, heads] in one call, bits unchanged."""
    if group is None:
        return x.contiguous(), list(statistics)
    dtype = statistics[0].dtype
    as_columns = torch.stack(statistics, dim=-1).contiguous().view(x.dtype)
    moved = exchange(torch.cat((x, as_columns), dim=-1), group)
    columns = moved[..., x.shape[-1] :].contiguous().view(dtype)
    return moved[..., : x.shape[-1]].contiguous(), list(columns.unbind(-1))
