"""The USP attention of one draft layer over the K TTT steps: Ulysses inside, ring outside.

Step 0 sends q, k and v in one all-to-all, and exchanges the keys and values over the ring once. Every step
gets (out, lse) of the step-0 keys back in another all-to-all and merges its diagonal keys into them on this
rank (merge.py); a step after the first sends q only. In backward each step sends (dout, q, lse, delta) and
receives dq; step 0 also receives dk and dv, summed over all steps. So the forward and backward of K steps
cost 4 K all-to-alls and, under `kv_exchange: gather`, one all-gather and one reduce-scatter.

Sending q a second time in backward costs a quarter more bytes than keeping the received q would, and saves a
third of what a step keeps.

Only live slots (layout/plan.py) have queries and diagonal keys; the others give step 0 a key and a value.

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
from eagle3_ds.parts import ATTENTION, marked

EXCHANGES: Mapping[str, Callable[[Tensor, Tensor, RingPlace], KVExchange]] = {
    "gather": PrefixKV,
    "ring": RingKV,
}
"""The exchanges by the names of the recipe's `parallel.kv_exchange`."""


class UnrollKV:
    """The keys and values of one layer over the steps of one unroll, and the sums of their gradients.

    The backward of the steps must run in reverse order. First, the keys of step s are read by all steps from
    s on, so their gradient is complete only when the backward of these has run. Second, every backward runs
    collectives, which all ranks must call in the same order. The ticket makes autograd keep the order: each
    step takes the ticket of the step before as an input and returns its own (docs/extending.md, "Three
    scalars that are zero").

    Attributes:
        plan, ring_rank: the cut of the sequence, and this rank's part of it.
        prefix: the exchanged step-0 keys and values; None before step 0.
        keys, values: the diagonal keys and values of steps 1, 2, ..., [Q, Hkv, D] each.
        dkeys, dvalues: their gradients, in their dtype. Empty before backward; the backward of a step takes
            the last entry away.
        ticket: scalar zero, returned by the latest step; None before step 0.
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
        """The number of the next step, which is how many steps have run."""
        return 0 if self.prefix is None else 1 + len(self.keys)


class Attended(NamedTuple):
    """The attention of one step over step-0 and diagonal keys.

    Attributes:
        out: [Q, Hq, D], in the dtype of q.
        lse: [Q, Hq], fp32 (fp64 for fp64).
    """

    out: Tensor
    lse: Tensor


class LlamaUSPFlashAttention(nn.Module):
    """Replaces a draft layer's attention (`patch_attention`). It holds the replaced module's own projections,
    so parameter names do not change.

    Attributes:
        q_proj, k_proj, v_proj, o_proj, head_dim: of the replaced module; q_norm and k_norm too, where it has
            them.
        scale: factor of the scores, head_dim**-0.5.
        kernel: computes the attention.
        kv_exchange: how the step-0 keys and values travel over the ring, `gather` or `ring`.
        kv_bytes: for `ring`, bytes of other ranks' keys and values that may be kept between the TTT steps.
        window: the most keys that a position sees, its own included; None for no limit.
        sp_ring_degree, sp_ulysses_degree, sp_world_size, sp_rank: the mesh, as RFC 338 names it.
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
        for name in ("q_norm", "k_norm"):
            if hasattr(attention, name):
                setattr(self, name, getattr(attention, name))
        self.scale = self.head_dim**-0.5
        self.kernel, self.kv_exchange, self.kv_bytes, self.window = kernel, kv_exchange, kv_bytes, window
        self.ulysses_group, self.ring_group = ulysses_group, ring_group
        self.sp_ulysses_degree = ulysses_group.size() if ulysses_group else 1
        self.sp_ring_degree = ring_group.size() if ring_group else 1
        self.sp_world_size = self.sp_ring_degree * self.sp_ulysses_degree
        ring_rank = ring_group.rank() if ring_group else 0
        self.sp_rank = ring_rank * self.sp_ulysses_degree + (ulysses_group.rank() if ulysses_group else 0)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, unroll: UnrollKV) -> Tensor:
        """Projections, rotation and attention of one TTT step, with autograd: x [S, 2H] (or [S, H]), cos and
        sin [S, D] -> [S, H]. For a plan in which all slots are live.
        """
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(self.attend(rotate(q, cos, sin), rotate(k, cos, sin), v, unroll))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, unroll: UnrollKV) -> Tensor:
        """The attention of one TTT step, `unroll.next_step`, with autograd.

        Args:
            q: [Q, Hq, D]; k, v: [S, Hkv, D] ([Q, Hkv, D] from step 1 on). q and k are rotated.
            unroll: the keys and values of the earlier steps; this step's are added to it.

        Returns:
            [Q, Hq * D].
        """
        out, unroll.ticket = _Attend.apply(q, k, v, unroll.ticket, self, unroll)
        return out.flatten(1)

    @marked(ATTENTION)
    def attend_forward(self, q: Tensor, k: Tensor, v: Tensor, unroll: UnrollKV) -> Attended:
        """`attend` without autograd: q [Q, Hq, D], k, v [S or Q, Hkv, D] -> out [Q, Hq, D], lse [Q, Hq].

        Step 0 exchanges k and v; a later step appends them to `unroll` as a diagonal.
        """
        step = unroll.next_step
        if unroll.prefix is None:
            q_heads, k_heads, v_heads = all_sequence_to_heads((q, k, v), self.ulysses_group)
            unroll.prefix = self.exchange(k_heads, v_heads, unroll.plan, unroll.ring_rank)
        else:
            unroll.keys.append(k)
            unroll.values.append(v)
            q_heads = sequence_to_heads(q, self.ulysses_group)
        out_heads, lse_heads = unroll.prefix.attend(q_heads, self.scale, step)
        out0, lse0 = self.home_with_statistics(out_heads.to(q.dtype), lse_heads)
        return Attended(*merge_diagonals(out0, lse0, q, unroll.keys, unroll.values, self.scale))

    @marked(ATTENTION)
    def attend_backward(
        self, dout: Tensor, q: Tensor, attended: Attended, unroll: UnrollKV, step: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Backward of `attend_forward` for TTT step `step`; that of all later steps must have run.

        delta = rowsum(dout * out) and the merged lse are the only statistics that the two parts of the
        softmax need: the diagonals here (merge.py), the step-0 keys in the kernel (kernels/base.py). dq is
        the sum of both parts.

        Args:
            dout: [Q, Hq, D]; q: [Q, Hq, D], as in forward.
            attended: what `attend_forward` returned.
            unroll: that of the forward; the gradients of earlier steps' diagonals are added to it.

        Returns:
            dq [Q, Hq, D], and dk, dv [Q, Hkv, D] ([S, Hkv, D] at step 0), in the dtype of q.
        """
        out, lse = attended
        assert unroll.prefix is not None
        if step > 0 and not unroll.dkeys:
            unroll.dkeys = [torch.zeros_like(key) for key in unroll.keys]
            unroll.dvalues = [torch.zeros_like(value) for value in unroll.values]
        dtype = accumulation_dtype(out.dtype)
        # delta needs the merged output, which exists only here: the kernel has seen the step-0 keys alone.
        delta = (dout.to(dtype) * out.to(dtype)).sum(-1)
        # This exchange runs while the diagonals are computed.
        pending = (
            start_sequence_to_heads(pack_heads((dout, q), (lse, delta)), self.ulysses_group)
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
            dout_heads, q_heads, lse, delta = unpack_heads(pending.wait(), (dout, q), (lse, delta))
            # Frees the received buffer, as large as dout and q, before the kernel allocates its workspace.
            del pending
        dq_heads = unroll.prefix.attend_backward(dout_heads, q_heads, lse, delta, self.scale, step).to(
            q.dtype
        )
        if dq is None:
            dk_heads, dv_heads = (x.to(q.dtype) for x in unroll.prefix.take_gradients())
            dq, dk, dv = all_heads_to_sequence((dq_heads, dk_heads, dv_heads), self.ulysses_group)
            return dq, dk, dv
        return dq + heads_to_sequence(dq_heads, self.ulysses_group), unroll.dkeys.pop(), unroll.dvalues.pop()

    def exchange(
        self,
        k_heads: Tensor,
        v_heads: Tensor,
        plan: SpanPlan,
        ring_rank: int,
        kernel: AttentionKernel | None = None,
    ) -> KVExchange:
        """Bring the keys and values of this rank's heads, [Lr, Hkv / u, D] each, to the ranks of the ring.
        Collective. `kernel` computes with them; None for the layer's.
        """
        place = RingPlace(plan, ring_rank, self.ring_group, kernel or self.kernel, self.window, self.kv_bytes)
        return EXCHANGES[self.kv_exchange](k_heads, v_heads, place)

    def home_with_statistics(self, x: Tensor, statistic: Tensor) -> tuple[Tensor, Tensor]:
        """One all-to-all from heads to sequence: x [Lq, Hq / u, D] -> [Q, Hq, D], statistic [Lq, Hq / u] ->
        [Q, Hq].
        """
        if self.ulysses_group is None:
            return x.contiguous(), statistic
        home, home_statistic = unpack_heads(
            heads_to_sequence(pack_heads((x,), (statistic,)), self.ulysses_group), (x,), (statistic,)
        )
        return home, home_statistic


class _Attend(torch.autograd.Function):
    """Forward: `attend_forward` of one step, and a new ticket.
    Backward: `attend_backward` of the step; the ticket makes it run after that of all later steps.
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
        # Detached, because `unroll` keeps k and v, and their graph refers to `unroll`. Such a cycle runs
        # through C++ nodes, which Python's garbage collector cannot free.
        attended = attention.attend_forward(q, k.detach(), v.detach(), unroll)
        ctx.save_for_backward(q, *attended)
        return attended.out, q.new_zeros(())

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dticket: Tensor) -> tuple[Tensor | None, ...]:
        q, *attended = ctx.saved_tensors
        gradients = ctx.attention.attend_backward(dout, q, Attended(*attended), ctx.unroll, ctx.step)
        return *gradients, dticket if ctx.step else None, None, None


def pack_heads(parts: Sequence[Tensor], statistics: Sequence[Tensor]) -> Tensor:
    """Join parts [rows, heads, D] of one dtype and statistics [rows, heads] for one exchange.

    The statistics (fp32, or fp64) are not converted: their bytes are viewed as entries of the parts' dtype,
    for example one fp32 number as two bf16 entries behind the D entries of each part.
    """
    columns = torch.stack(tuple(statistics), dim=-1).contiguous().view(parts[0].dtype)
    return torch.cat((*parts, columns), dim=-1)


def unpack_heads(packed: Tensor, parts: Sequence[Tensor], statistics: Sequence[Tensor]) -> list[Tensor]:
    """Split what an exchange of `pack_heads`'s result has returned; `parts` and `statistics` are what was
    sent, and give the sizes and dtypes.
    """
    sizes = [part.shape[-1] for part in parts]
    *arrived, columns = packed.split((*sizes, packed.shape[-1] - sum(sizes)), dim=-1)
    own = columns.contiguous().view(statistics[0].dtype)
    return [*(part.contiguous() for part in arrived), *own.unbind(-1)]
