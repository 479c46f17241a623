"""The bases of the flash kernels: many tiles in one variable-length call, and a backward that computes delta
from an output.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from eagle3_ds.kernels.base import Call, TileKernel, out_with_delta
from eagle3_ds.kernels.halves import cut_in_halves
from eagle3_ds.kernels.tile import Tile

_LOOKED_AT = 64
BACKWARD_ELEMENTS, MOST_BACKWARD_ROWS = 2**26, 2**18
"""Limits of one call of the backward: rows times the channels of all heads, and rows."""


class Lengths(NamedTuple):
    """Where the tiles of one call begin and end: rows [cu_q[i], cu_q[i + 1]) see keys [cu_k[i], cu_k[i + 1]).

    Attributes:
        cu_q, cu_k: int32 [tiles + 1] on the device, cumulated numbers of rows and of keys.
        max_q, max_k: the most rows and the most keys of one tile.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int

    @staticmethod
    def of(call: Call, device: torch.device) -> Lengths:
        rows = [tile.num_queries for tile in call.tiles]
        keys = [tile.num_keys for tile in call.tiles]
        return Lengths(_offsets(rows, device), _offsets(keys, device), max(rows), max(keys))


def backward_rows(query_size: int) -> int:
    """The most rows of one call of an accelerator's backward: 16,384 of 32 heads of 128 channels."""
    return min(BACKWARD_ELEMENTS // query_size, MOST_BACKWARD_ROWS)


class JoiningKernel(TileKernel):
    """Joins tiles of the same mask that share no row and no key into one call, so that a pack of many
    documents is one launch; its backend computes delta from an output.

    Its calls are longer than those of other kernels: an accelerator has memory for them, and fewer calls keep
    more of its units busy and add up fewer parts.
    """

    def backward_rows(self, query_size: int) -> int:
        """As the base's, by elements: a rank of Ulysses has fewer heads, and as much memory for more rows."""
        return backward_rows(query_size)

    def arranged(self, tiles: list[Tile]) -> list[Tile]:
        """Short tiles that see the same keys could not share a call: they are cut in halves."""
        return cut_in_halves(tiles)

    def calls(self, tiles: Iterable[Tile], most: int | None = None) -> list[Call]:
        """Join tiles greedily: each goes into the oldest call of the same mask that ends before it and has
        room. The time grows with the number of tiles: a call that no tile could join is looked at no more,
        and under a limit at most `_LOOKED_AT` others are.
        """
        ordered = sorted(tiles, key=lambda tile: tile[:4])
        sizes = [(tile.num_queries, tile.num_keys) for tile in ordered]
        least = tuple(map(min, *sizes)) if len(sizes) > 1 else (0, 0)
        groups: list[_Group] = []
        looked_at: dict[tuple[bool, int | None], list[_Group]] = {}
        for tile in ordered:
            of_mask = looked_at.setdefault((tile.causal, tile.left), [])
            group = next((group for group in of_mask if group.takes(tile, most)), None)
            if group is None:
                groups.append(group := _Group())
                of_mask.append(group)
            group.add(tile)
            if most is not None and (group.is_full(least, most) or len(of_mask) > _LOOKED_AT):
                of_mask.remove(group if group.is_full(least, most) else of_mask[0])
        return [Call(tuple(group.tiles)) for group in groups]

    def delta_form(self, dout: Tensor, delta: Tensor) -> Tensor:
        """delta [L, H] -> the stand-in output [L, H, D] of `out_with_delta`."""
        return out_with_delta(dout, delta)


class VarlenKernel(JoiningKernel):
    """A joining kernel with the arguments of FlashAttention.

    The backend takes q [total_q, Hq, D] and k, v [total_k, Hkv, D] with unit stride in D, aligns `causal` and
    `left` at the bottom right corner of each tile, and its log-sum-exp is fp32 [Hq, total_q].
    """

    @abstractmethod
    def varlen_forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, causal: bool, left: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """q [total_q, Hq, D], k, v [total_k, Hkv, D] -> out [total_q, Hq, D], lse fp32 [Hq, total_q]."""

    @abstractmethod
    def varlen_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        lengths: Lengths,
        causal: bool,
        left: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients under the merged lse [Hq, total_q]; the backend computes delta = rowsum(dout * out).

        dout, q, out [total_q, Hq, D], k, v [total_k, Hkv, D] -> dq, dk, dv in the shapes of q, k, v. `out` is
        the stand-in of `out_with_delta`, not the output of `varlen_forward`.
        """

    def call_forward(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = self.varlen_forward(q, k, v, Lengths.of(call, q.device), call.causal, call.left, scale)
        return out, lse.T

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
        lengths = Lengths.of(call, q.device)
        return self.varlen_backward(
            dout, q, k, v, delta, lse.T.contiguous(), lengths, call.causal, call.left, scale
        )


class _Group:
    """Tiles that one call computes, while others may still join them."""

    def __init__(self) -> None:
        self.tiles: list[Tile] = []
        self.rows = self.keys = 0

    def takes(self, tile: Tile, most: int | None) -> bool:
        last = self.tiles[-1]
        if last.q_stop > tile.q_start or last.k_stop > tile.k_start:
            return False
        return most is None or max(self.rows + tile.num_queries, self.keys + tile.num_keys) <= most

    def add(self, tile: Tile) -> None:
        self.tiles.append(tile)
        self.rows, self.keys = self.rows + tile.num_queries, self.keys + tile.num_keys

    def is_full(self, least: Sequence[int], most: int) -> bool:
        """Whether no tile of at least `least` rows and keys could join."""
        return self.rows + least[0] > most or self.keys + least[1] > most


def _offsets(sizes: list[int], device: torch.device) -> Tensor:
    # CUDA stages a copy this small from pageable memory before the call returns: the host does not wait for
    # the device, and the source may be freed at once.
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32).to(device, non_blocking=True)
