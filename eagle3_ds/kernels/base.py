"""The interface of an attention kernel, and what every tiled one shares: the loop over tiles and the merge.

Legend: Lq query rows of this rank, Lk key rows, Hq / Hkv heads, D head size. Query head h uses key head
h // (Hq // Hkv).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from eagle3_ds.kernels.tile import Tile, cut_into_squares


class AttentionKernel(ABC):
    """Attention over tiles. Stateless; it runs outside autograd, its callers own the graph."""

    name: str

    @abstractmethod
    def unavailable_reason(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why this kernel cannot run there, as the end of a sentence; None when it can."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], scale: float) -> tuple[Tensor, Tensor]:
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
    """Merge two partial attentions over different keys. out [L, H, D], lse [L, H]; a row without keys has lse -inf."""
    lse = torch.logaddexp(lse_a, lse_b)
    # (-inf) - (-inf) is nan: a row that has seen no key yet keeps its zero output.
    safe = torch.where(torch.isneginf(lse), torch.zeros_like(lse), lse)
    out = out_a * (lse_a - safe).exp()[..., None] + out_b * (lse_b - safe).exp()[..., None]
    return out, lse


def out_with_delta(dout: Tensor, delta: Tensor) -> Tensor:
    """An output whose row sum with dout is delta, for kernels that recompute delta from it: dout * delta / |dout|^2.

    All terms of that sum have one sign and |result| <= |merged output|, so rounding to the dtype of dout costs no more
    than one rounding of delta. dout is scaled by its largest entry first: the square of a tiny one would underflow.
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


class TileKernel(AttentionKernel):
    """A kernel made of calls for one tile each: a subclass computes a tile, this class loops and merges.

    Attributes:
        takes_bands: whether the backend takes every tile as it is. Where it does not, it gets full rectangles, causal
            squares, and squares with `left` 0, in which row i sees the keys from i on.
    """

    takes_bands: bool

    @abstractmethod
    def tile_forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, left: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """One tile: q [Lq, Hq, D], k, v [Lk, Hkv, D] -> out [Lq, Hq, D], lse [Lq, Hq]."""

    @abstractmethod
    def tile_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        delta: Tensor,
        causal: bool,
        left: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One tile under the merged lse and delta -> dq [Lq, Hq, D], dk, dv [Lk, Hkv, D]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], scale: float) -> tuple[Tensor, Tensor]:
        parts = tuple(self._parts(tiles))
        merging = _share_rows(parts)
        dtype = accumulation_dtype(q.dtype)
        # Rows that are written once need no wide copy of the output.
        out = torch.zeros_like(q, dtype=dtype if merging else q.dtype, memory_format=torch.contiguous_format)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)
        for part in parts:
            rows, keys = slice(part.q_start, part.q_stop), slice(part.k_start, part.k_stop)
            new = self.tile_forward(q[rows], k[keys], v[keys], part.causal, part.left, scale)
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
        for part in self._parts(tiles):
            rows, keys = slice(part.q_start, part.q_stop), slice(part.k_start, part.k_stop)
            dq_tile, dk_tile, dv_tile = self.tile_backward(
                dout[rows], q[rows], k[keys], v[keys], lse[rows], delta[rows], part.causal, part.left, scale
            )
            dq[rows] += dq_tile
            dk_accum[keys] += dk_tile
            dv_accum[keys] += dv_tile
        return dq

    def _parts(self, tiles: Sequence[Tile]) -> Iterator[Tile]:
        """The tiles as the backend takes them, empty ones left out."""
        for tile in tiles:
            if tile.num_queries == 0 or tile.num_keys == 0:
                continue
            tile.check()
            yield from (tile,) if self.takes_bands else cut_into_squares(tile)


def _share_rows(tiles: Sequence[Tile]) -> bool:
    """Whether some query row is in two tiles."""
    ordered = sorted((tile.q_start, tile.q_stop) for tile in tiles)
    return any(stop > start for (_, stop), (start, _) in zip(ordered, ordered[1:], strict=False))
