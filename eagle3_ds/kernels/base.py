"""The interface of an attention kernel, and what every tiled one shares: the loop over tiles and the merge.

Legend: Lq query rows of this rank, Lk key rows, Hq / Hkv heads, D head size. Query head h uses key head
h // (Hq // Hkv).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eagle3_ds.kernels.tile import Tile, cut_into_blocks


class AttentionKernel(ABC):
    """Attention over tiles. Stateless; it runs outside autograd, its callers own the graph."""

    name: str

    @abstractmethod
    def unavailable_reason(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why this kernel cannot run there, as the end of a sentence; None when it can."""

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], scale: float
    ) -> tuple[Tensor, Tensor]:
        """Softmax over every key that the tiles show a row; a key that two tiles show it counts twice.

        Args:
            q: [Lq, Hq, D]; k, v: [Lk, Hkv, D], one dtype.

        Returns:
            out [Lq, Hq, D] in the dtype of q, and lse [Lq, Hq] fp32 (fp64 for fp64), the log of the sum of
            exp(scale * q . k). A row in no tile has out 0 and lse -inf.
        """

    @abstractmethod
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
        """Gradient under a merged softmax: p = exp(scale * q . k - lse), ds = p (dout . v - delta).

        Args:
            dout: [Lq, Hq, D] gradient of the merged output; q, k, v as in `forward`.
            lse: [Lq, Hq] of the whole softmax, in which other keys may take part.
            delta: [Lq, Hq] row sum of dout * merged output. Both fp32 (fp64 for fp64).
            dk_accum, dv_accum: [Lk, Hkv, D] fp32 (fp64 for fp64); the gradients are added to them.

        Returns:
            dq [Lq, Hq, D] fp32 (fp64 for fp64).
        """


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_partial(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two partial attentions over different keys. out [L, H, D], lse [L, H]; a row without keys has lse
    -inf.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    # (-inf) - (-inf) is nan: a row that has seen no key yet keeps its zero output.
    safe = torch.where(torch.isneginf(lse), torch.zeros_like(lse), lse)
    out = out_a * (lse_a - safe).exp()[..., None] + out_b * (lse_b - safe).exp()[..., None]
    return out, lse


def out_with_delta(dout: Tensor, delta: Tensor) -> Tensor:
    """An output whose row sum with dout is delta, for kernels that recompute delta from it: dout * delta /
    |dout|^2.

    All terms of that sum have one sign and |result| <= |merged output|, so rounding to the dtype of dout
    costs no more than one rounding of delta. dout is scaled by its largest entry first: the square of a tiny
    one would underflow.
    """
    wide = dout.to(delta.dtype)
    largest = wide.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(delta.dtype).tiny)
    unit = wide / largest
    # The square sum is at least 1 but for a row of zeros, whose delta is 0 too.
    square = unit.square().sum(-1, keepdim=True).clamp_min(1.0)
    return (unit * (delta[..., None] / largest / square)).to(dout.dtype)


def sum_over_group(x: Tensor, num_kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Sum the gradients of the query heads that share a key head. x [L, Hq, D] -> [L, Hkv, D] in `dtype`."""
    return x.unflatten(1, (num_kv_heads, -1)).sum(2, dtype=dtype)


class Call(NamedTuple):
    """Tiles that a backend computes at once: one kind of mask, rows and keys ascending, in no two of them."""

    tiles: tuple[Tile, ...]

    @property
    def causal(self) -> bool:
        return self.tiles[0].causal

    @property
    def left(self) -> int | None:
        return self.tiles[0].left

    @property
    def rows(self) -> list[slice]:
        return _joined((tile.q_start, tile.q_stop) for tile in self.tiles)

    @property
    def keys(self) -> list[slice]:
        return _joined((tile.k_start, tile.k_stop) for tile in self.tiles)


class TileKernel(AttentionKernel):
    """A kernel made of calls that compute one tile, or several at once: a subclass computes, this class loops
    and merges.

    Attributes:
        backward_block: rows, and about as many keys, that one call of a backward takes. A backend makes
            gradients in the inputs' dtype for every query head of both, and its own sums, so this bounds what
            the longest document needs beside them.
    """

    backward_block = 2**12

    @abstractmethod
    def call_forward(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float
    ) -> tuple[Tensor, Tensor]:
        """q [Lq, Hq, D], k, v [Lk, Hkv, D]: the call's rows and keys alone, one after another -> out, lse
        [Lq, Hq].
        """

    @abstractmethod
    def call_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        delta: Tensor,
        call: Call,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same rows and keys under the merged lse -> dq [Lq, Hq, D], dk, dv [Lk, Hkv, D].

        `delta` is what `delta_form` made of it.
        """

    def calls(self, tiles: Iterable[Tile], most: int | None = None) -> list[Call]:
        """The tiles, none of them empty, as the backend takes them; `most`: rows, and keys, of a call of
        several tiles.
        """
        return [Call((tile,)) for tile in tiles]

    def delta_form(self, dout: Tensor, delta: Tensor) -> Tensor:
        """How the backend takes delta [Lq, Hq]: as it is, or as an output [Lq, Hq, D] to compute it from."""
        return delta

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], scale: float
    ) -> tuple[Tensor, Tensor]:
        calls = self.calls(_nonempty(tiles))
        dtype = accumulation_dtype(q.dtype)
        if len(calls) == 1 and calls[0].rows == [slice(0, len(q))]:
            out, lse = self._forward_call(q, k, v, calls[0], scale)
            return out.to(q.dtype).contiguous(), lse.to(dtype).contiguous()
        merging = _share_rows(calls)
        # Rows that are written once need no wide copy of the output.
        out = torch.zeros_like(q, dtype=dtype if merging else q.dtype, memory_format=torch.contiguous_format)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)
        for call in calls:
            new_out, new_lse = self._forward_call(q, k, v, call, scale)
            for rows, part in _places(call.rows):
                new = new_out[part], new_lse[part]
                out[rows], lse[rows] = merge_partial(out[rows], lse[rows], *new) if merging else new
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
        dq = torch.zeros_like(q, dtype=accumulation_dtype(q.dtype), memory_format=torch.contiguous_format)
        delta = self.delta_form(dout, delta)
        blocks = (block for tile in _nonempty(tiles) for block in cut_into_blocks(tile, self.backward_block))
        for call in self.calls(blocks, self.backward_block):
            dout_rows, q_rows, lse_rows, delta_rows = (_take(x, call.rows) for x in (dout, q, lse, delta))
            k_rows, v_rows = _take(k, call.keys), _take(v, call.keys)
            grads = self.call_backward(dout_rows, q_rows, k_rows, v_rows, lse_rows, delta_rows, call, scale)
            for total, new, ranges in zip(
                (dq, dk_accum, dv_accum), grads, (call.rows, call.keys, call.keys), strict=True
            ):
                for place, part in _places(ranges):
                    total[place] += new[part]
        return dq

    def _forward_call(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float
    ) -> tuple[Tensor, Tensor]:
        return self.call_forward(_take(q, call.rows), _take(k, call.keys), _take(v, call.keys), call, scale)


def _nonempty(tiles: Sequence[Tile]) -> Iterator[Tile]:
    for tile in tiles:
        if tile.num_queries and tile.num_keys:
            tile.check()
            yield tile


def _joined(ranges: Iterable[tuple[int, int]]) -> list[slice]:
    """Ascending ranges, adjacent ones joined."""
    joined: list[slice] = []
    for start, stop in ranges:
        if joined and joined[-1].stop == start:
            joined[-1] = slice(joined[-1].start, stop)
        else:
            joined.append(slice(start, stop))
    return joined


def _take(x: Tensor, ranges: list[slice]) -> Tensor:
    """The rows of `ranges`, one after another; a view where they are one range."""
    return x[ranges[0]] if len(ranges) == 1 else torch.cat([x[part] for part in ranges])


def _places(ranges: list[slice]) -> Iterator[tuple[slice, slice]]:
    """Each range, and where `_take` has put it."""
    start = 0
    for place in ranges:
        stop = start + place.stop - place.start
        yield place, slice(start, stop)
        start = stop


def _share_rows(calls: Sequence[Call]) -> bool:
    """Whether some query row is in two tiles."""
    ordered = sorted((rows.start, rows.stop) for call in calls for rows in call.rows)
    return any(stop > start for (_, stop), (start, _) in zip(ordered, ordered[1:], strict=False))
