"""The interface of an attention kernel, and the loop over tiles that all kernels but the reference share.

One softmax may be computed in parts: over the tiles of one call, over the blocks of a ring, over the step-0
keys and the diagonal keys. With (out_b, lse_b) of each part b, the whole is

    lse = log sum_b exp(lse_b)        out = sum_b exp(lse_b - lse) out_b

and the gradient of every part needs two statistics of the whole only, lse and delta = rowsum(dout * out):

    s = scale * q . k        p = exp(s - lse)        ds = p * (dout . v - delta)
    dq = scale * sum_k ds k        dk = scale * sum_q ds q        dv = sum_q p dout

This is why `backward` takes lse and delta from its caller ("external" statistics) instead of computing them.

Legend: Lq query rows of this rank, Lk key rows, Hq / Hkv heads, D head size. Query head h uses key head
h // (Hq // Hkv).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from eagle3_ds.kernels.tile import Tile, cut_into_blocks


class AttentionKernel(ABC):
    """Attention over tiles. A kernel has no state and builds no autograd graph; its callers are autograd
    Functions, or run without gradients.

    Attributes:
        name: the value of the recipe's `attention.kernel` that chooses it.
    """

    name: str

    @abstractmethod
    def unavailable_reason(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why this kernel cannot run with heads of `head_dim` and this dtype on `device`; None when it can.

        The text completes a message, e.g. "it runs on CPUs, and the device is cuda:0".
        """

    def suits(self, device: torch.device) -> bool:
        """Whether `auto` may take this kernel on a device that it runs on."""
        return True

    def for_short_tiles(self) -> AttentionKernel:
        """The kernel as short checks run it: all its ways of computing are taken for short tiles too."""
        return self

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attention of each query row to all keys that its tiles show; a key shown by two tiles counts twice.

        Args:
            q: [Lq, Hq, D]; k, v: [Lk, Hkv, D], all of one dtype.
            tiles: the mask, in rows of q and of k.
            scale: factor of the scores, usually D**-0.5.

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
        """Gradients of q, k and v under the softmax that lse and delta describe (formulas at the top).

        Args:
            dout: [Lq, Hq, D], gradient of the merged output; q, k, v, tiles and scale as in `forward`.
            lse: [Lq, Hq], the log-sum-exp of the whole softmax, which may include keys of other calls.
            delta: [Lq, Hq], row sum of dout * merged output. Both statistics are fp32 (fp64 for fp64).
            dk_accum, dv_accum: [Lk, Hkv, D] fp32 (fp64 for fp64); the gradients are added to them in place.

        Returns:
            dq [Lq, Hq, D] fp32 (fp64 for fp64).
        """


BACKWARD_ROWS = 2**12
"""The most rows of one call of the backward, where a kernel does not say another number."""
_STAND_IN_ROWS = 2**13
"""Rows of one part of `out_with_delta`."""
_FEW_RANGES = 4
"""That are read and written one by one."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and softmax statistics of tensors of `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_partial(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two partial attentions over different keys: lse = log(exp lse_a + exp lse_b), and
    out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b.

    Args:
        out_a, out_b: [L, H, D]; lse_a, lse_b: [L, H]. A row that has seen no key has out 0 and lse -inf.

    Returns:
        out [L, H, D] and lse [L, H], in the dtype that the operands promote to.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    # Where both parts are empty, lse_a - lse would be (-inf) - (-inf) = nan; with 0 in place of lse the
    # weight is exp(-inf) = 0.
    safe = torch.where(torch.isneginf(lse), torch.zeros_like(lse), lse)
    out = out_a * (lse_a - safe).exp()[..., None] + out_b * (lse_b - safe).exp()[..., None]
    return out, lse


def out_with_delta(dout: Tensor, delta: Tensor) -> Tensor:
    """A stand-in for the merged output: o' = dout * delta / |dout|^2, for which rowsum(dout * o') = delta.

    The flash backwards take no delta; they compute it as rowsum(dout * out) from the output they are given.
    The true merged output would have to travel to this rank's heads first; delta is D times smaller. The
    stand-in loses nothing: all terms of its row sum have the sign of delta, and
    |o'| <= |merged output| (Cauchy-Schwarz), so rounding it to a half dtype costs no more than one rounding
    of delta.

    Args:
        dout: [L, H, D]; delta: [L, H] fp32 (fp64 for fp64).

    Returns:
        o' [L, H, D] in the dtype of dout.
    """
    found = torch.empty_like(dout, memory_format=torch.contiguous_format)
    # Part by part, because the fp32 copies of all rows would be the largest tensors of the backward.
    for start in range(0, len(dout), _STAND_IN_ROWS):
        rows = slice(start, start + _STAND_IN_ROWS)
        found[rows] = _stand_in(dout[rows], delta[rows])
    return found


def _stand_in(dout: Tensor, delta: Tensor) -> Tensor:
    wide = dout.to(delta.dtype)
    largest = wide.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(delta.dtype).tiny)
    # Divided by its largest entry first, because the square of a tiny gradient would underflow. The squares
    # of `unit` then sum to at least 1, except in a row of zeros, whose delta is 0 too.
    unit = wide / largest
    square = unit.square().sum(-1, keepdim=True).clamp_min(1.0)
    return unit.mul_(delta[..., None] / largest / square)


def sum_over_group(x: Tensor, num_kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Sum the gradients of the query heads that share a key head: x [L, Hq, D] -> [L, Hkv, D] in `dtype`."""
    return x.unflatten(1, (num_kv_heads, -1)).sum(2, dtype=dtype)


class Rows:
    """Some rows of a tensor, ascending, as few ranges.

    Attributes:
        ranges: adjacent ones joined: (0, 30), (30, 90), (100, 120) -> 0:90, 100:120.
    """

    def __init__(self, ranges: tuple[slice, ...]) -> None:
        self.ranges = ranges
        self._indices: dict[torch.device, Tensor] = {}

    @staticmethod
    def of(ranges: Iterable[tuple[int, int]]) -> Rows:
        joined: list[slice] = []
        for start, stop in ranges:
            if joined and joined[-1].stop == start:
                joined[-1] = slice(joined[-1].start, stop)
            else:
                joined.append(slice(start, stop))
        return Rows(tuple(joined))

    def take(self, x: Tensor) -> Tensor:
        """These rows of x [L, ...]; a view when they are one range."""
        if len(self.ranges) == 1:
            return x[self.ranges[0]]
        if len(self.ranges) <= _FEW_RANGES:
            return torch.cat([x[part] for part in self.ranges])
        return x.index_select(0, self._index(x.device))

    def places(self, device: torch.device) -> Iterator[tuple[slice | Tensor, slice]]:
        """Where the rows of what `take` returned are written: pairs of a place and its part. Each of few
        ranges is a pair; many are one, because every pair costs launches.
        """
        if len(self.ranges) > _FEW_RANGES:
            yield self._index(device), slice(None)
            return
        start = 0
        for place in self.ranges:
            stop = start + place.stop - place.start
            yield place, slice(start, stop)
            start = stop

    def _index(self, device: torch.device) -> Tensor:
        """int64, made and copied to the device once for all layers and steps of a pack."""
        if device not in self._indices:
            index = torch.cat([torch.arange(part.start, part.stop) for part in self.ranges])
            self._indices[device] = index.to(device)
        return self._indices[device]


@dataclass(frozen=True)
class Call:
    """Tiles that one call of a backend computes together.

    All have the same `causal` and `left`. Each begins, in rows and in keys, where the one before it ends or
    later: so no row and no key is in two of them. For example the documents of a pack on one rank are one
    call: Tile(0, 30, 0, 30, True), Tile(30, 90, 30, 90, True).
    """

    tiles: tuple[Tile, ...]

    @property
    def causal(self) -> bool:
        return self.tiles[0].causal

    @property
    def left(self) -> int | None:
        return self.tiles[0].left

    @cached_property
    def rows(self) -> Rows:
        """Query rows of all tiles."""
        return Rows.of((tile.q_start, tile.q_stop) for tile in self.tiles)

    @cached_property
    def keys(self) -> Rows:
        """Key rows of all tiles."""
        return Rows.of((tile.k_start, tile.k_stop) for tile in self.tiles)


class TileKernel(AttentionKernel):
    """A kernel whose backend computes one call at a time: a subclass computes the calls, this class loops
    over them and merges their results.
    """

    def backward_rows(self, query_size: int) -> int:
        """The most query rows of one call of the backward, and about the most keys, for rows of `query_size`
        channels, those of all heads together.

        A backend allocates gradients for every query head of the rows and the keys of a call, and workspace
        of its own; without this bound, that temporary memory would grow with the longest document.
        """
        return BACKWARD_ROWS

    @abstractmethod
    def call_forward(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attention of one call.

        Args:
            q: [Lq, Hq, D], the call's query rows, concatenated; k, v: [Lk, Hkv, D], its key rows.

        Returns:
            out [Lq, Hq, D] and lse [Lq, Hq].
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
        """Gradients of one call under the merged softmax.

        Args:
            dout, q, k, v: as in `call_forward`; lse: [Lq, Hq], merged.
            delta: what `delta_form` returned, the call's rows: [Lq, Hq], or [Lq, Hq, D].

        Returns:
            dq [Lq, Hq, D], dk and dv [Lk, Hkv, D].
        """

    def calls(self, tiles: Iterable[Tile], most: int | None = None) -> list[Call]:
        """Distribute non-empty tiles over calls; here one call per tile.

        Args:
            most: the most rows, and the most keys, of a call that joins several tiles; None for no limit.
        """
        return [Call((tile,)) for tile in tiles]

    def arranged(self, tiles: list[Tile]) -> list[Tile]:
        """The non-empty tiles, cut as suits `calls`; here as they are."""
        return tiles

    def delta_form(self, dout: Tensor, delta: Tensor) -> Tensor:
        """Convert delta [Lq, Hq] to what the backend takes: itself here; for backends that compute delta from
        an output, such an output [Lq, Hq, D] (`out_with_delta`). dout [Lq, Hq, D].
        """
        return delta

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], scale: float
    ) -> tuple[Tensor, Tensor]:
        """As `AttentionKernel.forward`: computes the calls and merges their results row by row."""
        calls = _planned(self, tuple(tiles), None)
        dtype = accumulation_dtype(q.dtype)
        if len(calls) == 1 and calls[0].rows.ranges == (slice(0, len(q)),):
            out, lse = self._forward_call(q, k, v, calls[0], scale)
            return out.to(q.dtype).contiguous(), lse.to(dtype).contiguous()
        merging = _share_rows(calls)
        # Where no row is in two calls nothing is merged, and the output needs no fp32 copy.
        out = torch.zeros_like(q, dtype=dtype if merging else q.dtype, memory_format=torch.contiguous_format)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)
        for call in calls:
            new_out, new_lse = self._forward_call(q, k, v, call, scale)
            for rows, part in call.rows.places(q.device):
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
        """As `AttentionKernel.backward`: cuts tiles to `backward_rows` and adds up the calls' gradients."""
        dq = torch.zeros_like(q, dtype=accumulation_dtype(q.dtype), memory_format=torch.contiguous_format)
        delta = self.delta_form(dout, delta)
        for call in _planned(self, tuple(tiles), self.backward_rows(q.shape[1] * q.shape[2])):
            dout_rows, q_rows, lse_rows, delta_rows = (call.rows.take(x) for x in (dout, q, lse, delta))
            k_rows, v_rows = call.keys.take(k), call.keys.take(v)
            grads = self.call_backward(dout_rows, q_rows, k_rows, v_rows, lse_rows, delta_rows, call, scale)
            for total, new, ranges in zip(
                (dq, dk_accum, dv_accum), grads, (call.rows, call.keys, call.keys), strict=True
            ):
                for place, part in ranges.places(q.device):
                    total[place] += new[part]
        return dq

    def _forward_call(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float
    ) -> tuple[Tensor, Tensor]:
        return self.call_forward(call.rows.take(q), call.keys.take(k), call.keys.take(v), call, scale)


@lru_cache(maxsize=64)
def _planned(kernel: TileKernel, tiles: tuple[Tile, ...], most: int | None) -> list[Call]:
    """The calls for `tiles`, cut to `most` rows where it is given. All layers, and all steps of a pack that
    see the same keys, ask for the same.
    """
    parts: Iterable[Tile] = kernel.arranged(list(_nonempty(tiles)))
    if most is not None:
        parts = (block for tile in parts for block in cut_into_blocks(tile, most))
    return kernel.calls(parts, most)


def _nonempty(tiles: Sequence[Tile]) -> Iterator[Tile]:
    for tile in tiles:
        if tile.num_queries and tile.num_keys:
            tile.check()
            yield tile


def _share_rows(calls: Sequence[Call]) -> bool:
    """Whether some query row is in two calls, so that their outputs must be merged."""
    ordered = sorted((rows.start, rows.stop) for call in calls for rows in call.rows.ranges)
    return any(stop > start for (_, stop), (start, _) in zip(ordered, ordered[1:], strict=False))
