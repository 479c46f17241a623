"""Attention of scattered rows with many heads: the blocks of anchors (attention/blocks.py).

A kernel computes each head of a tile on its own. A scattered anchor is a tile of one row, so each of its
many query heads, those of all inputs of a block, would be a product of one row. Here the query heads that
share a key head are *folded* into rows of one head: a tile of one row and N * G heads is one of G rows and N
heads. All of them see the same keys, so it needs no mask.

Neighbouring rows see nearly the same keys. They are joined: one tile up to where the first of them stops, and
a narrow one behind it for each of the others. Rows a, b, c that see 900, 910 and 930 keys:

    Tile(a..c, keys 0..900)    Tile(b, keys 900..910)    Tile(c, keys 900..930)

Measured on one core with the cpu kernel, fp32, forward + backward of 256 scattered rows in a document of 4096
tokens, 64 query heads over 2 key heads of 64: 0.13 + 0.29 s, and 0.75 + 21 s without this.

Legend: Lq query rows, N key heads, G query heads of each, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eagle3_ds.kernels.base import AttentionKernel, accumulation_dtype, merge_partial
from eagle3_ds.kernels.tile import Tile

# Tiles of so many rows stay as they are: each head of them is a product large enough, and needs no copy.
SHORT = 32
# The most rows that are joined. With 8, 32 and 64 the scattered rows above took 2 to 14% longer.
JOINED = 16


class FoldedKernel(AttentionKernel):
    """Folds the short tiles of another kernel's calls, and joins them.

    Args:
        kernel: computes the tiles.
    """

    def __init__(self, kernel: AttentionKernel) -> None:
        self.kernel, self.name = kernel, kernel.name

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return self.kernel.unavailable_reason(device, dtype, head_dim)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], scale: float
    ) -> tuple[Tensor, Tensor]:
        """As `AttentionKernel.forward`."""
        heads = k.shape[1]
        short, long = _parted(tiles, q.shape[1] // heads)
        if not short:
            return self.kernel.forward(q, k, v, long, scale)
        folded = self.kernel.forward(_fold(q, heads), k, v, short, scale)
        out, lse = (_unfold(x, q.shape[0]) for x in folded)
        if not long:
            return out, lse
        dtype = accumulation_dtype(q.dtype)
        more, more_lse = self.kernel.forward(q, k, v, long, scale)
        out, lse = merge_partial(out.to(dtype), lse, more.to(dtype), more_lse)
        return out.to(q.dtype), lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        delta: Tensor,
        tiles: Sequence[Tile],
        scale: float,
        dk_accum: Tensor,
        dv_accum: Tensor,
    ) -> Tensor:
        """As `AttentionKernel.backward`."""
        heads = k.shape[1]
        short, long = _parted(tiles, q.shape[1] // heads)
        sums = (scale, dk_accum, dv_accum)
        if not short:
            return self.kernel.backward(dout, q, k, v, lse, delta, long, *sums)
        folded = [_fold(x, heads) for x in (dout, q, lse, delta)]
        dq = _unfold(
            self.kernel.backward(folded[0], folded[1], k, v, folded[2], folded[3], short, *sums), q.shape[0]
        )
        return dq + self.kernel.backward(dout, q, k, v, lse, delta, long, *sums) if long else dq


class _Row(NamedTuple):
    """A query row and the keys [start, stop) that it sees."""

    row: int
    start: int
    stop: int


def _parted(tiles: Sequence[Tile], group: int) -> tuple[list[Tile], list[Tile]]:
    """The short tiles, folded and joined, and the others. `group` is G."""
    if group == 1:
        return [], list(tiles)
    short = [tile for tile in tiles if tile.num_queries < SHORT]
    # By the first key, so that the rows that see one document, or one block of a ring, stand together.
    rows = sorted((row for tile in short for row in _rows(tile)), key=lambda row: (row.start, row.row))
    folded = [
        Tile(first * group, last * group, start, stop, False)
        for first, last, start, stop in _joined(rows)
        if stop > start
    ]
    return folded, [tile for tile in tiles if tile.num_queries >= SHORT]


def _rows(tile: Tile) -> Iterator[_Row]:
    """What each row of a tile sees."""
    for row in range(tile.q_start, tile.q_stop):
        own = tile.k_stop - (tile.q_stop - row)
        start = tile.k_start if tile.left is None else max(tile.k_start, own - tile.left)
        yield _Row(row, start, own + 1 if tile.causal else tile.k_stop)


def _joined(rows: Sequence[_Row]) -> Iterator[tuple[int, int, int, int]]:
    """Tiles (first row, last row + 1, first key, last key + 1) that show what `rows` see, ascending.

    Rows are joined that follow each other and begin to see at the same key, as long as no row sees more than
    twice as much as the first of them.
    """

    def of(joined: list[_Row]) -> Iterator[tuple[int, int, int, int]]:
        shared = min(row.stop for row in joined)
        yield joined[0].row, joined[-1].row + 1, joined[0].start, shared
        yield from ((row.row, row.row + 1, shared, row.stop) for row in joined)

    joined: list[_Row] = []
    for row in rows:
        if joined and not (
            len(joined) < JOINED
            and row.row == joined[-1].row + 1
            and row.start == joined[0].start
            and joined[0].stop <= row.stop <= 2 * joined[0].stop - row.start
        ):
            yield from of(joined)
            joined = []
        joined.append(row)
    if joined:
        yield from of(joined)


def _fold(x: Tensor, heads: int) -> Tensor:
    """[Lq, N * G, ...] -> [Lq * G, N, ...]."""
    return x.unflatten(1, (heads, -1)).transpose(1, 2).flatten(0, 1).contiguous()


def _unfold(x: Tensor, rows: int) -> Tensor:
    """[Lq * G, N, ...] -> [Lq, N * G, ...]."""
    return x.unflatten(0, (rows, -1)).transpose(1, 2).flatten(1, 2).contiguous()
