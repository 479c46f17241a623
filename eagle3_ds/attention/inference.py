"""Attention of a frozen model (the target) under ring x ulysses: forward over packed documents, without
autograd.

Each layer sends q, k and v in one all-to-all, gathers the keys and values over the ring, and gets its output
back in a second all-to-all. Nothing is kept, so a target of any depth holds the keys and values of one layer
at a time.

Legend: S slots of this rank, Lr = S * ulysses columns of this ring rank, L padded length, Hq / Hkv heads, D
head size.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from eagle3_ds.attention.tiles import gathered_tiles
from eagle3_ds.collectives import all_gather_rows, all_sequence_to_heads, heads_to_sequence
from eagle3_ds.kernels import AttentionKernel, Tile
from eagle3_ds.layout import SpanPlan


class PackedAttention:
    """Causal attention within each document of one packed sequence, for all layers of one forward.

    Attributes:
        num_calls: how often `attend` has run, so that a caller can check that every layer used it.
    """

    def __init__(
        self,
        plan: SpanPlan,
        ring_rank: int,
        kernel: AttentionKernel,
        ulysses_group: dist.ProcessGroup | None = None,
        ring_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.plan, self.ring_rank, self.kernel = plan, ring_rank, kernel
        self.ulysses_group, self.ring_group = ulysses_group, ring_group
        self.num_calls = 0
        self._tiles: dict[int | None, tuple[Tile, ...]] = {}

    @torch.no_grad()
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """The attention of one layer over this rank's slots. Collective over the sp group.

        Args:
            q: [S, Hq, D]; k, v: [S, Hkv, D]. If ulysses does not divide Hkv, the key heads are repeated
                until it does.
            scale: factor of the scores.
            window: the most keys that a slot sees, its own included; None for no limit.
            sinks: [Hq], a learned logit per head that takes part in the softmax but has no value.

        Returns:
            [S, Hq, D] in the dtype of q; zeros for padding.

        Raises:
            ValueError: v has another shape than k, or ulysses does not divide Hq, or the window is below one.
        """
        if v.shape != k.shape:
            raise ValueError(
                f"the target's values are {tuple(v.shape[1:])} and its keys {tuple(k.shape[1:])}: the "
                "attention kernels take one head size. Capture with target.capture: single."
            )
        self.num_calls += 1
        parts = (q, *self._repeat_key_heads(k, v, q.shape[1]))
        q_heads, k_heads, v_heads = all_sequence_to_heads(parts, self.ulysses_group)
        k_all, v_all = self._gather(k_heads, v_heads)
        if window not in self._tiles:
            self._tiles[window] = gathered_tiles(self.plan, self.ring_rank, window, live=False)
        out, lse = self.kernel.forward(q_heads, k_all, v_all, self._tiles[window], scale)
        if sinks is not None:
            out = out * self._share_beside_sinks(lse, sinks).to(out.dtype)
        return heads_to_sequence(out, self.ulysses_group)

    def _repeat_key_heads(self, k: Tensor, v: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
        """Repeat each key head in place (a, a, b, b) until ulysses divides their number, so that query heads
        keep their key head.
        """
        ulysses, num_kv_heads = self.plan.ulysses, k.shape[1]
        if num_heads % ulysses:
            fitting = max(degree for degree in range(1, ulysses) if num_heads % degree == 0)
            raise ValueError(
                f"parallel.ulysses is {ulysses}, which does not divide the target's {num_heads} query heads. "
                f"Set it to {fitting}; the rest of the sequence parallelism belongs to parallel.ring."
            )
        times = math.lcm(num_kv_heads, ulysses) // num_kv_heads
        return (
            (k, v) if times == 1 else (k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1))
        )

    def _gather(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [Lr, H, D] of this ring rank -> [L, H, D] of all, in sequence order."""
        if self.plan.in_sequence_order:
            return k.contiguous(), v.contiguous()
        order = torch.from_numpy(self.plan.sequence_order).to(k.device)
        gathered = all_gather_rows(torch.cat((k, v), dim=-1), self.ring_group)[order]
        k_all, v_all = gathered.chunk(2, dim=-1)
        return k_all.contiguous(), v_all.contiguous()

    def _share_beside_sinks(self, lse: Tensor, sinks: Tensor) -> Tensor:
        """The share of the softmax that the sink leaves to the keys: exp(lse) / (exp(lse) + exp(sink)) =
        sigmoid(lse - sink). lse [Lr, Hq / ulysses], sinks [Hq] -> [Lr, Hq / ulysses, 1].
        """
        rank = self.ulysses_group.rank() if self.ulysses_group else 0
        own = sinks.to(lse.dtype).chunk(self.plan.ulysses)[rank]
        return (lse - own).sigmoid()[..., None]
