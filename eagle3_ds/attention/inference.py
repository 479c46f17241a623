"""Attention of a frozen model under ring x ulysses: one layer's forward over packed documents, outside
autograd.

q, k and v leave in one all-to-all and the output comes home in another; the keys and values of the ring are
gathered once. Nothing outlives the layer, so a target of any depth holds the keys and values of one layer
only.

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
    """Causal attention within the documents of one packed sequence, for every layer of one forward.

    Attributes:
        num_calls: how many layers have attended so far.
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
            q: [S, Hq, D]; k, v: [S, Hkv, D]. Key heads that ulysses does not divide are repeated until it
                does.
            window: keys that a slot sees at most, its own among them; None: all before it.
            sinks: [Hq], a learned logit of each head that takes its share of the softmax and carries no
                value.

        Returns:
            [S, Hq, D]; zeros for padding.

        Raises:
            ValueError: values of another size than keys, or query heads that ulysses does not divide.
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
        """Repeat each key head so often that ulysses divides their number; the query heads of a key head stay
        with it.
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
        """[Lr, H, D] of this ring rank -> [L, H, D] in sequence order."""
        if self.plan.in_sequence_order:
            return k.contiguous(), v.contiguous()
        order = torch.from_numpy(self.plan.sequence_order).to(k.device)
        gathered = all_gather_rows(torch.cat((k, v), dim=-1), self.ring_group)[order]
        k_all, v_all = gathered.chunk(2, dim=-1)
        return k_all.contiguous(), v_all.contiguous()

    def _share_beside_sinks(self, lse: Tensor, sinks: Tensor) -> Tensor:
        """What the keys keep of the softmax when the sink takes part: e^lse / (e^lse + e^sink), [Lr, Hq /
        ulysses, 1].
        """
        rank = self.ulysses_group.rank() if self.ulysses_group else 0
        own = sinks.to(lse.dtype).chunk(self.plan.ulysses)[rank]
        return (lse - own).sigmoid()[..., None]
