"""The point-to-point ring: for lengths where the gathered keys and values of a whole sequence would not fit.

Blocks of keys and values travel around the ring, double-buffered: the next block is on its way while this one
is computed. Blocks that fit a byte limit are kept between the TTT steps, the others are streamed again in
each of them. The mask is "hybrid": which tile of a block is full, causal or absent comes from the span plan,
so any chunk-to-rank map works (Liu et al., Ring Attention, 2023, with the causal balance moved into the
plan).

Hop h of a ring rank meets the block of rank - h.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from eagle3_ds.attention.exchange import RingPlace
from eagle3_ds.attention.tiles import StepTiles, block_tiles
from eagle3_ds.collectives import RingExchange, RingTransfer
from eagle3_ds.kernels import AttentionKernel, Tile, accumulation_dtype, merge_partial

Block = list[Tensor]
"""k and v of one ring rank, [Lr, Hkv, D] each."""


def ring_attention_hybrid_masked(
    q: Tensor,
    blocks: Iterable[tuple[int, Sequence[Tensor]]],
    tiles: Sequence[Sequence[Tile]],
    kernel: AttentionKernel,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Packed causal attention to blocks of keys and values as they pass: one online softmax over all of them.

    With (out_b, lse_b) of each block alone: lse = log sum_b exp(lse_b), out = sum_b exp(lse_b - lse) out_b.
    The mask is hybrid: which tile of a block is full, causal or absent comes from the span plan.

    Args:
        q: [Lq, Hq, D], this ring rank's live columns.
        blocks: hop and (k, v), [Lr, Hkv, D] each; what is computed with one hides the way of the next.
        tiles: by hop, what of q looks at what of that block.
        kernel: computes the tiles. scale: of the scores.

    Returns:
        out [Lq, Hq, D] in fp32 (fp64 for fp64), lse [Lq, Hq]; rows that see nothing are zero with lse -inf.
    """
    dtype = accumulation_dtype(q.dtype)
    out = torch.zeros_like(q, dtype=dtype)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)
    for hop, (k, v) in blocks:
        out, lse = merge_partial(out, lse, *kernel.forward(q, k, v, tiles[hop], scale))
    return out, lse


class RingKV:
    """`kv_exchange: ring` (see `KVExchange`): this ring rank's block, those it keeps, and the stream of
    others.

    Attributes:
        num_kept: blocks held between the steps, this rank's own among them; those of hops 0 .. num_kept - 1.
    """

    def __init__(self, k_heads: Tensor, v_heads: Tensor, place: RingPlace) -> None:
        plan, ring_rank = place.plan, place.ring_rank
        self.plan, self.ring_rank, self.kernel = plan, ring_rank, place.kernel
        self.exchange = RingExchange(place.ring_group)
        self.tiles = StepTiles(
            lambda left: [
                block_tiles(plan, ring_rank, (ring_rank - hop) % plan.ring, left) for hop in range(plan.ring)
            ],
            place.window,
        )
        self.kept: list[Block] = [[k_heads.contiguous(), v_heads.contiguous()]]
        self.dtype = accumulation_dtype(k_heads.dtype)
        entry_bytes = k_heads.element_size() + self.dtype.itemsize
        self.num_kept = min(plan.ring, 1 + place.kv_bytes // max(1, 2 * k_heads.numel() * entry_bytes))
        self.gradients: list[Block] = []

    def attend(self, q_heads: Tensor, scale: float, step: int = 0) -> tuple[Tensor, Tensor]:
        """As `KVExchange.attend`; out in fp32 (fp64 for fp64)."""
        return ring_attention_hybrid_masked(q_heads, self._blocks(), self.tiles.at(step), self.kernel, scale)

    def attend_backward(
        self, dout: Tensor, q_heads: Tensor, lse: Tensor, delta: Tensor, scale: float, step: int = 0
    ) -> Tensor:
        """As `KVExchange.attend_backward`. The gradient of a kept block is summed here; of a streamed one it
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
