"""The point-to-point ring: for lengths where the gathered keys and values of a whole sequence would not fit.

Blocks of keys and values travel around the ring, double-buffered: the next block is on its way while this one
is computed. Blocks that fit a byte limit are kept between the TTT steps, the others are streamed again in
each of them. The mask is "hybrid": which tile of a block is full, causal or absent comes from the span plan,
so any chunk-to-rank map works (Liu et al., Ring Attention, 2023, with the causal balance moved into the
plan).

Hop h of a ring rank meets the block of rank - h.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from eagle3_ds.attention.tiles import StepTiles, block_tiles
from eagle3_ds.collectives import RingExchange, RingTransfer
from eagle3_ds.kernels import AttentionKernel, accumulation_dtype, merge_partial
from eagle3_ds.layout import SpanPlan

Block = list[Tensor]
"""k and v of one ring rank, [Lr, Hkv, D] each."""


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
    """Packed causal attention over the ring, once, forward only (`RingKV` holds the gradient and serves K
    steps).

    Args:
        q: [Lq, Hq, D], this ring rank's live columns; k, v: [Lr, Hkv, D], all its columns.

    Returns:
        out [Lq, Hq, D] in fp32 (fp64 for fp64), lse [Lq, Hq]; rows of padding are zero with lse -inf.
    """
    return RingKV(k, v, plan, ring_rank, ring_group, kernel).attend(q, scale)


class RingKV:
    """The second strategy behind the interface of `PrefixKV`: this ring rank's block, those it keeps, and the
    stream of others.

    Attributes:
        num_kept: blocks held between the steps, this rank's own among them; those of hops 0 .. num_kept - 1.
    """

    def __init__(
        self,
        k_heads: Tensor,
        v_heads: Tensor,
        plan: SpanPlan,
        ring_rank: int,
        ring_group: dist.ProcessGroup | None,
        kernel: AttentionKernel,
        keep_bytes: int = 0,
        window: int | None = None,
    ) -> None:
        """`keep_bytes`: bytes of other ranks' keys and values, and of their gradients, that may be kept."""
        self.plan, self.ring_rank, self.kernel = plan, ring_rank, kernel
        self.exchange = RingExchange(ring_group)
        self.tiles = StepTiles(
            lambda left: [
                block_tiles(plan, ring_rank, (ring_rank - hop) % plan.ring, left) for hop in range(plan.ring)
            ],
            window,
        )
        self.kept: list[Block] = [[k_heads.contiguous(), v_heads.contiguous()]]
        self.dtype = accumulation_dtype(k_heads.dtype)
        entry_bytes = k_heads.element_size() + self.dtype.itemsize
        self.num_kept = min(plan.ring, 1 + keep_bytes // max(1, 2 * k_heads.numel() * entry_bytes))
        self.gradients: list[Block] = []

    def attend(self, q_heads: Tensor, scale: float, step: int = 0) -> tuple[Tensor, Tensor]:
        """As `PrefixKV.attend`; out in fp32 (fp64 for fp64)."""
        out = torch.zeros_like(q_heads, dtype=self.dtype)
        lse = torch.full(q_heads.shape[:2], -torch.inf, dtype=self.dtype, device=q_heads.device)
        for hop, block in self._blocks():
            k, v = block
            part, part_lse = self.kernel.forward(q_heads, k, v, self.tiles.at(step)[hop], scale)
            out, lse = merge_partial(out, lse, part, part_lse)
        return out, lse

    def attend_backward(
        self, dout: Tensor, q_heads: Tensor, lse: Tensor, delta: Tensor, scale: float, step: int = 0
    ) -> Tensor:
        """As `PrefixKV.attend_backward`. The gradient of a kept block is summed here; of a streamed one it
        travels along.
        """
        dq = torch.zeros_like(q_heads, dtype=self.dtype)
        if not self.gradients:
            self.gradients = [[torch.zeros_like(x, dtype=self.dtype) for x in block] for block in self.kept]
        travelling: RingTransfer | None = None
        for hop, block in self._blocks():
            streamed = hop >= self.num_kept
            gradient = [torch.zeros_like(x) for x in self.gradients[0]] if streamed else self.gradients[hop]
            (k, v), (dk, dv) = block, gradient
            dq += self.kernel.backward(
                dout, q_heads, k, v, lse, delta, self.tiles.at(step)[hop], scale, dk, dv
            )
            if streamed:
                # What earlier ranks found travelled while this was computed.
                if travelling is not None:
                    _add(gradient, travelling.wait())
                travelling = self.exchange.start(gradient)
        if travelling is not None:
            # One hop beyond the last is home.
            _add(self.gradients[0], travelling.wait())
        return dq

    def take_gradients(self) -> tuple[Tensor, Tensor]:
        """dk, dv of this ring rank's own block, fp32, over all ranks; forgotten here.

        The block of hop h is owned h ranks back, which is ring - h hops ahead. So the gradients of the kept
        blocks board one lap at hop h each, and whatever sits in one message has one owner: they are summed on
        the way.
        """
        home, *others = self.gradients
        self.gradients = []
        carried: Block = []
        for hop in range(1, self.plan.ring) if others else ():
            if hop <= len(others):
                if carried:
                    _add(others[hop - 1], carried)
                carried = others[hop - 1]
            carried = self.exchange.start(carried).wait()
        if carried:
            _add(home, carried)
        return home[0], home[1]

    def _blocks(self) -> Iterator[tuple[int, Block]]:
        """Every hop and its block. A block that is not here yet is on its way while the one before is
        computed.
        """
        block = self.kept[0]
        for hop in range(self.plan.ring):
            arriving = self.exchange.start(block) if len(self.kept) <= hop + 1 < self.plan.ring else None
            yield hop, block
            if arriving is None:
                block = self.kept[hop + 1] if hop + 1 < len(self.kept) else block
                continue
            block = arriving.wait()
            if hop + 1 < self.num_kept:
                self.kept.append(block)


def _add(total: Sequence[Tensor], part: Sequence[Tensor]) -> None:
    for mine, more in zip(total, part, strict=True):
        mine.add_(more)
