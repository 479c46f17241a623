"""The base of kernels whose backend computes only full rectangles and causal squares."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

from torch import Tensor

from eagle3_ds.kernels.base import Call, TileKernel, out_with_delta
from eagle3_ds.kernels.tile import Tile, cut_into_squares


class SquareKernel(TileKernel):
    """Cuts each tile into rectangles and squares (`cut_into_squares`), one call each.

    A mirrored square becomes causal when its rows and its keys are both reversed: row i, which sees the keys
    j >= i, becomes row n - 1 - i, which sees the keys n - 1 - j <= n - 1 - i.
    """

    @abstractmethod
    def square_forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """q [Lq, Hq, D], k, v [Lk, Hkv, D], Lq = Lk if `causal` -> out [Lq, Hq, D], lse [Lq, Hq]."""

    @abstractmethod
    def square_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        out: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients under the merged lse [Lq, Hq]; the backend computes delta = rowsum(dout * out).

        dout, q, out [Lq, Hq, D], k, v [Lk, Hkv, D] -> dq [Lq, Hq, D], dk, dv [Lk, Hkv, D]. `out` is the
        stand-in of `out_with_delta`, not the output of `square_forward`.
        """

    def calls(self, tiles: Iterable[Tile], most: int | None = None) -> list[Call]:
        """One call per rectangle or square; none of them is joined, so `most` has no effect."""
        return [Call((part,)) for tile in tiles for part in cut_into_squares(tile)]

    def delta_form(self, dout: Tensor, delta: Tensor) -> Tensor:
        """delta [L, H] -> the stand-in output [L, H, D] of `out_with_delta`."""
        return out_with_delta(dout, delta)

    def call_forward(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float
    ) -> tuple[Tensor, Tensor]:
        if call.left is None:
            return self.square_forward(q, k, v, call.causal, scale)
        out, lse = self.square_forward(q.flip(0), k.flip(0), v.flip(0), True, scale)
        return out.flip(0), lse.flip(0)

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
        if call.left is None:
            return self.square_backward(dout, q, k, v, lse, delta, call.causal, scale)
        dout, q, k, v, lse, delta = (x.flip(0) for x in (dout, q, k, v, lse, delta))
        dq, dk, dv = self.square_backward(dout, q, k, v, lse, delta, True, scale)
        return dq.flip(0), dk.flip(0), dv.flip(0)
