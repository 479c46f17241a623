"""The point-to-point ring (Liu et al., Ring Attention, 2023): for lengths where the gathered keys and values
of a whole sequence would not fit the memory.

A block is the step-0 keys and values of one ring rank. Blocks travel around the ring: at hop h a rank
computes with the block of rank - h, while the block of the next hop arrives. As many blocks as fit `kv_bytes`
are kept between the TTT steps; the others are sent again in every step. The mask is "hybrid": the span plan
says which tile of a block is full, causal or absent. So any map of chunks to ranks works, and it is the plan
that balances the causal work.
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
"""k and v of one ring rank, or their gradients, [Lr, Hkv, D] each."""


def ring_attention_hybrid_masked(
    q: Tensor,
    blocks: Iterable[tuple[int, Sequence[Tensor]]],
    tiles: Sequence[Sequence[Tile]],
    kernel: AttentionKernel,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Packed causal attention to blocks of keys and values as they arrive, with one online softmax over all.

    With (out_b, lse_b) of each block alone: lse = log sum_b exp(lse_b), out = sum_b exp(lse_b - lse) out_b.

    Args:
        q: [Lq, Hq, D], this ring rank's live columns.
        blocks: pairs of a hop and its block (k, v), [Lr, Hkv, D] each. An iterator may let the next block
            travel while the caller computes with this one.
        tiles: by hop, the mask of q against that block.
        kernel: computes the tiles.
        scale: factor of the scores.

    Returns:
        out [Lq, Hq, D] and lse [Lq, Hq], fp32 (fp64 for fp64). Rows that see no key have out 0 and lse -inf.
    """
    dtype = accumulation_dtype(q.dtype)
    out = torch.zeros_like(q, dtype=dtype)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)
    for hop, (k, v) in blocks:
        out, lse = merge_partial(out, lse, *kernel.forward(q, k, v, tiles[hop], scale))
    return out, lse


class RingKV:
    """`kv_exchange: ring` (see `KVExchange`): this ring rank's block, the blocks that it keeps, and the
    others as they pass.

    Attributes:
        num_kept: how many blocks are held between the steps: those of hops 0 .. num_kept - 1, the own one
            included.
        kept: the blocks held so far, by hop; step 0 fills it.
        gradients: fp32 (fp64 for fp64) sums of dk and dv of the kept blocks; empty before backward.
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
        """As `KVExchange.attend`; out [Lq, Hq, D] is fp32 (fp64 for fp64)."""
        return ring_attention_hybrid_masked(q_heads, self._blocks(), self.tiles.at(step), self.kernel, scale)

    def attend_backward(
        self, dout: Tensor, q_heads: Tensor, lse: Tensor, delta: Tensor, scale: float, step: int = 0
    ) -> Tensor:
        """As `KVExchange.attend_backward`. The gradient of a kept block is summed on this rank. That of a
        passing block follows the block from rank to rank, each adds its part, and the last hop leads to the
        block's owner.
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
                # The sum of the earlier ranks arrived while this rank computed its own part.
                if travelling is not None:
                    _add(gradient, travelling.wait())
                travelling = self.exchange.start(gradient)
        if travelling is not None:
            # The message after the last hop is the gradient of this rank's own block.
            _add(self.gradients[0], travelling.wait())
        return dq

    def take_gradients(self) -> tuple[Tensor, Tensor]:
        """As `KVExchange.take_gradients`: the gradients of the kept blocks return to their owners in one lap.

        The owner of the block of hop h is h ranks back, which is ring - h messages ahead. So each rank adds
        its sum for hop h to the h-th message of the lap. All parts of one message then belong to the same
        owner and are summed on the way. For ring = 4: rank 3's part for hop 1 (owner 2) starts in message 1
        and passes the ranks 0 and 1, where the parts for hops 2 and 3, of the same owner, are added.
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
        """Every hop with its block. A block that is not kept travels while the caller computes with the one
        before it.
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
