"""The USP attention of one draft layer over the K TTT steps (DESIGN: Ulysses inside, ring outside).

Step 0 sends q, k and v in one all-to-all, then exchanges the keys and values over the ring once. Steps >= 1
send q and receive (out, lse): their own keys are diagonal, seen by their own slot alone, and never leave the
rank. In backward each step sends (dout, q, lse, delta) and receives dq; step 0 receives dk and dv with it,
summed over all steps. Forward and backward of K steps cost 4K all-to-alls, one all-gather and one
reduce-scatter. That q travels twice costs a quarter more bytes than keeping what arrived the first time, and
saves a third of what a step keeps.

Only live slots (layout/plan.py) have queries, and diagonals with them; the other slots give step 0 a key and
a value.

Legend: S slots of this rank, Q live ones; Lr = S * ulysses columns of this ring rank, Lq = Q * ulysses live
ones; Hq / Hkv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eagle3_ds.attention.exchange import KVExchange, RingPlace
from eagle3_ds.attention.merge import merge_diagonals, merge_diagonals_backward
from eagle3_ds.attention.prefix_kv import PrefixKV
from eagle3_ds.attention.ring import RingKV
from eagle3_ds.attention.rotary import rotate
from eagle3_ds.collectives import (
    all_heads_to_sequence,
    all_sequence_to_heads,
    heads_to_sequence,
    sequence_to_heads,
    start_sequence_to_heads,
)
from eagle3_ds.costs import ExchangeName
from eagle3_ds.kernels import AttentionKernel, accumulation_dtype
from eagle3_ds.layout import SpanPlan

EXCHANGES: Mapping[str, Callable[[Tensor, Tensor, RingPlace], KVExchange]] = {
    "gather": PrefixKV,
    "ring": RingKV,
}
"""By the recipe's `parallel.kv_exchange`."""


class UnrollKV:
    """What one layer remembers over the steps of one unroll, and what their backward sums up.

    The backward of the steps must run in reverse order, so that a step's own gradients are whole when its
    turn comes. The ticket, a scalar that each step hands to the next, holds autograd to it.

    Attributes:
        prefix: the step-0 keys and values; None before step 0.
        keys, values: the diagonals of the steps since, [Q, Hkv, D] each.
        dkeys, dvalues: their gradients, in their dtype; empty before backward, and one shorter after each
            step's.
    """

    def __init__(self, plan: SpanPlan, ring_rank: int) -> None:
        self.plan, self.ring_rank = plan, ring_rank
        self.prefix: KVExchange | None = None
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.dkeys: list[Tensor] = []
        self.dvalues: list[Tensor] = []
        self.ticket: Tensor | None = None

    @property
    def next_step(self) -> int:
        """How many steps have been taken."""
        return 0 if self.prefix is None else 1 + len(self.keys)


class Attended(NamedTuple):
    """The attention of one step: out [Q, Hq, D] in q's dtype, lse fp32 [Q, Hq]."""

    out: Tensor
    lse: Tensor


class LlamaUSPFlashAttention(nn.Module):
    """Takes the place of a draft layer's attention. Parameter names stay: the projections are the replaced
    module's own.

    Attributes:
        sp_ring_degree, sp_ulysses_degree, sp_world_size, sp_rank: the mesh, as RFC 338 names it.
        kv_bytes: for `kv_exchange` ring, bytes of other ranks' keys and values that are kept between the
            TTT steps.
        window: keys that a position sees at most, its own among them; None: all before it.
    """

    def __init__(
        self,
        attention: Any,
        kernel: AttentionKernel,
        ulysses_group: dist.ProcessGroup | None = None,
        ring_group: dist.ProcessGroup | None = None,
        kv_exchange: ExchangeName = "gather",
        kv_bytes: int = 0,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.q_proj: nn.Module = attention.q_proj
        self.k_proj: nn.Module = attention.k_proj
        self.v_proj: nn.Module = attention.v_proj
        self.o_proj: nn.Module = attention.o_proj
        self.head_dim: int = attention.head_dim
        self.scale = self.head_dim**-0.5
        self.kernel, self.kv_exchange, self.kv_bytes, self.window = kernel, kv_exchange, kv_bytes, window
        self.ulysses_group, self.ring_group = ulysses_group, ring_group
        self.sp_ulysses_degree = ulysses_group.size() if ulysses_group else 1
        self.sp_ring_degree = ring_group.size() if ring_group else 1
        self.sp_world_size = self.sp_ring_degree * self.sp_ulysses_degree
        ring_rank = ring_group.rank() if ring_group else 0
        self.sp_rank = ring_rank * self.sp_ulysses_degree + (ulysses_group.rank() if ulysses_group else 0)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, unroll: UnrollKV) -> Tensor:
        """x [S, 2H] (or [S, H]), cos and sin [S, D] -> [S, H]."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(self.attend(rotate(q, cos, sin), rotate(k, cos, sin), v, unroll))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, unroll: UnrollKV) -> Tensor:
        """The attention of one TTT step with autograd, [Q, Hq * D]; the step is how often `unroll` has been
        here before.

        q [Q, Hq, D], k, v [S, Hkv, D] ([Q, Hkv, D] from step 1 on), q and k rotated.
        """
        out, unroll.ticket = _Attend.apply(q, k, v, unroll.ticket, self, unroll)
        return out.flatten(1)

    def attend_forward(self, q: Tensor, k: Tensor, v: Tensor, unroll: UnrollKV) -> Attended:
        """The attention of one TTT step, outside autograd; its key and value are remembered."""
        step = unroll.next_step
        if unroll.prefix is None:
            q_heads, k_heads, v_heads = all_sequence_to_heads((q, k, v), self.ulysses_group)
            unroll.prefix = self._exchange(k_heads, v_heads, unroll)
        else:
            unroll.keys.append(k)
            unroll.values.append(v)
            q_heads = sequence_to_heads(q, self.ulysses_group)
        out_heads, lse_heads = unroll.prefix.attend(q_heads, self.scale, step)
        out0, lse0 = self._home_with_statistics(out_heads.to(q.dtype), lse_heads)
        return Attended(*merge_diagonals(out0, lse0, q, unroll.keys, unroll.values, self.scale))

    def attend_backward(
        self, dout: Tensor, q: Tensor, attended: Attended, unroll: UnrollKV, step: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of TTT step `step`, in the dtype of q; the later steps' backward has run.

        dout [Q, Hq, D]; q [Q, Hq, D] as in forward.
        """
        out, lse = attended
        assert unroll.prefix is not None
        if step > 0 and not unroll.dkeys:
            unroll.dkeys = [torch.zeros_like(key) for key in unroll.keys]
            unroll.dvalues = [torch.zeros_like(value) for value in unroll.values]
        dtype = accumulation_dtype(out.dtype)
        delta = (dout.to(dtype) * out.to(dtype)).sum(-1)
        # On its way while the diagonals are computed.
        pending = (
            start_sequence_to_heads(_pack((dout, q), (lse, delta)), self.ulysses_group)
            if self.ulysses_group
            else None
        )
        dq: Tensor | None = None
        if step > 0:
            diagonals = (unroll.keys[:step], unroll.values[:step])
            gradients = (unroll.dkeys[:step], unroll.dvalues[:step])
            dq = merge_diagonals_backward(dout, q, *diagonals, lse, delta, self.scale, *gradients)
        dout_heads, q_heads = dout.contiguous(), q
        if pending is not None:
            dout_heads, q_heads, lse, delta = _unpack(pending.wait(), (dout, q), (lse, delta))
            # What travelled is as large as dout and q, and the kernel's workspace comes now.
            del pending
        dq_heads = unroll.prefix.attend_backward(dout_heads, q_heads, lse, delta, self.scale, step).to(
            q.dtype
        )
        if dq is None:
            dk_heads, dv_heads = (x.to(q.dtype) for x in unroll.prefix.take_gradients())
            dq, dk, dv = all_heads_to_sequence((dq_heads, dk_heads, dv_heads), self.ulysses_group)
            return dq, dk, dv
        return dq + heads_to_sequence(dq_heads, self.ulysses_group), unroll.dkeys.pop(), unroll.dvalues.pop()

    def _exchange(self, k_heads: Tensor, v_heads: Tensor, unroll: UnrollKV) -> KVExchange:
        place = RingPlace(
            unroll.plan, unroll.ring_rank, self.ring_group, self.kernel, self.window, self.kv_bytes
        )
        return EXCHANGES[self.kv_exchange](k_heads, v_heads, place)

    def _home_with_statistics(self, x: Tensor, statistic: Tensor) -> tuple[Tensor, Tensor]:
        """x [Lq, Hq / u, D] and statistic [Lq, Hq / u] in heads layout -> [Q, Hq, D], [Q, Hq]."""
        if self.ulysses_group is None:
            return x.contiguous(), statistic
        home, home_statistic = _unpack(
            heads_to_sequence(_pack((x,), (statistic,)), self.ulysses_group), (x,), (statistic,)
        )
        return home, home_statistic


class _Attend(torch.autograd.Function):
    """Forward: the attention of one step. Backward: of the same step, after those of the later ones (the
    ticket).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        _ticket: Tensor | None,
        attention: LlamaUSPFlashAttention,
        unroll: UnrollKV,
    ) -> tuple[Tensor, Tensor]:
        ctx.attention, ctx.unroll, ctx.step = attention, unroll, unroll.next_step
        # Remembered without their graph, which holds the unroll: a cycle that no collector sees, and that
        # would outlive the step.
        attended = attention.attend_forward(q, k.detach(), v.detach(), unroll)
        ctx.save_for_backward(q, *attended)
        return attended.out, q.new_zeros(())

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dticket: Tensor) -> tuple[Tensor | None, ...]:
        q, *attended = ctx.saved_tensors
        gradients = ctx.attention.attend_backward(dout, q, Attended(*attended), ctx.unroll, ctx.step)
        return *gradients, dticket if ctx.step else None, None, None


def _pack(parts: Sequence[Tensor], statistics: Sequence[Tensor]) -> Tensor:
    """Parts [rows, heads, D] of one dtype for one exchange, behind them fp32 (or fp64) statistics [rows,
    heads], bit by bit.
    """
    columns = torch.stack(tuple(statistics), dim=-1).contiguous().view(parts[0].dtype)
    return torch.cat((*parts, columns), dim=-1)


def _unpack(packed: Tensor, parts: Sequence[Tensor], statistics: Sequence[Tensor]) -> list[Tensor]:
    """What `_pack` was given, as it arrived; `parts` and `statistics` are what was sent."""
    sizes = [part.shape[-1] for part in parts]
    *arrived, columns = packed.split((*sizes, packed.shape[-1] - sum(sizes)), dim=-1)
    own = columns.contiguous().view(statistics[0].dtype)
    return [*(part.contiguous() for part in arrived), *own.unbind(-1)]
