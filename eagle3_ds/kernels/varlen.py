"""The base of the flash kernels: many tiles in one variable-length call, and a backward that computes delta
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
from eagle3_ds.kernels.tile import Tile


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


class VarlenKernel(TileKernel):
    """Joins tiles of the same mask that share no row and no key into one call, so that a pack of many
    documents is one launch.

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

    def calls(self, tiles: Iterable[Tile], most: int | None = None) -> list[Call]:
        """Join tiles greedily: each goes into the first call of the same mask that ends before it."""
        groups: list[list[Tile]] = []
        for tile in sorted(tiles, key=lambda tile: tile[:4]):
            open_groups = (group for group in groups if most is None or _have_room(group, tile, most))
            group = next((group for group in open_groups if _follows(tile, group[-1])), None)
            if group is None:
                groups.append([tile])
            else:
                group.append(tile)
        return [Call(tuple(group)) for group in groups]

    def delta_form(self, dout: Tensor, delta: Tensor) -> Tensor:
        """delta [L, H] -> the stand-in output [L, H, D] of `out_with_delta`."""
        return out_with_delta(dout, delta)

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


def _follows(tile: Tile, last: Tile) -> bool:
    same_kind = (tile.causal, tile.left) == (last.causal, last.left)
    return same_kind and last.q_stop <= tile.q_start and last.k_stop <= tile.k_start


def _have_room(group: Sequence[Tile], tile: Tile, most: int) -> bool:
    rows = sum(member.num_queries for member in group) + tile.num_queries
    keys = sum(member.num_keys for member in group) + tile.num_keys
    return max(rows, keys) <= most


def _offsets(sizes: list[int], device: torch.device) -> Tensor:
    # CUDA stages a copy this small from pageable memory before the call returns: the host does not wait for
    # the device, and the source may be freed at once.
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32).to(device, non_blocking=True)
