"""The cudnn kernel: torch's built-in cuDNN attention, through its raw operators, for the large part of long
documents; torch's FlashAttention 2 for the rest.

On an H200, cuDNN 9.19 computes the forward at 616 TFLOP/s and the backward at 510, where FlashAttention 2
reaches 335 and 283 (docs/lab-notes.md). But it makes a plan for every new size, some tenths of a second each,
and torch's operator for several sequences makes one in every call. So cuDNN gets only rectangles and squares
whose sides are powers of two: a few dozen plans, whatever the documents' lengths are. What remains, short
documents and windows among it, goes to the flash kernel, many tiles in a call.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from eagle3_ds.kernels.base import AttentionKernel, Call
from eagle3_ds.kernels.cuda import CudaKernel
from eagle3_ds.kernels.nvidia import nvidia_reason
from eagle3_ds.kernels.tile import Tile, cut_into_powers

LEAST, MOST = 2**11, 2**14
"""Sides of what cuDNN computes: the shortest, and the most rows."""
LEAST_IN_CHECKS = 2**6
# Older versions demand that the gradient of the output has the strides of the output.
_OLDEST_CUDNN = 90501


class CudnnKernel(CudaKernel):
    """cuDNN for blocks of `least` rows and keys or more, `CudaKernel` for what remains.

    Args:
        least: a power of two.
    """

    name = "cudnn"

    def __init__(self, least: int = LEAST) -> None:
        self._least = least

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if reason := nvidia_reason(device, dtype, head_dim, max_head_dim=128):
            return reason
        version = torch.backends.cudnn.version() or 0
        if version < _OLDEST_CUDNN:
            return f"it needs cuDNN {_OLDEST_CUDNN} (9.5.1) or newer, and this torch has {version or 'none'}"
        if torch.are_deterministic_algorithms_enabled():
            return "its backward is not deterministic, and torch.use_deterministic_algorithms is on"
        return super().unavailable_reason(device, dtype, head_dim)

    def suits(self, device: torch.device) -> bool:
        """Hopper and later. On Ampere, FlashAttention 2 is at home."""
        return torch.cuda.get_device_capability(device) >= (9, 0)

    def for_short_tiles(self) -> AttentionKernel:
        return CudnnKernel(LEAST_IN_CHECKS)

    def backward_rows(self, query_size: int) -> int:
        """As the flash kernel's, down to a power of two."""
        return 1 << (super().backward_rows(query_size).bit_length() - 1)

    def arranged(self, tiles: list[Tile]) -> list[Tile]:
        """A tile of two blocks or more is cut into blocks and what remains."""
        found: list[Tile] = []
        for tile in super().arranged(tiles):
            worth = min(tile.num_queries, tile.num_keys) >= 2 * self._least
            found += cut_into_powers(tile, self._least, MOST) if worth else [tile]
        return found

    def calls(self, tiles: Iterable[Tile], most: int | None = None) -> list[Call]:
        """A call for each block; the flash kernel's for the rest."""
        blocks: list[Tile] = []
        rest: list[Tile] = []
        for tile in tiles:
            (blocks if self._is_block(tile) else rest).append(tile)
        return [*(Call((block,)) for block in blocks), *super().calls(rest, most)]

    def call_forward(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float
    ) -> tuple[Tensor, Tensor]:
        if not self._is_block(*call.tiles):
            return super().call_forward(q, k, v, call, scale)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *map(_heads_first, (q, k, v)), None, True, 0.0, call.causal, False, scale=scale
        )
        return out[0].transpose(0, 1), lse.view(q.shape[1], q.shape[0]).T

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
        if not self._is_block(*call.tiles):
            return super().call_backward(dout, q, k, v, lse, delta, call, scale)
        # The operator reads the two philox arguments only under dropout, which is off.
        philox = torch.empty((), dtype=torch.int64, device=q.device)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *(_heads_first(x) for x in (dout, q, k, v, delta)),
            _statistics(lse, q),
            philox,
            philox,
            None,
            None,
            None,
            q.shape[0],
            k.shape[0],
            0.0,
            call.causal,
            scale=scale,
        )
        return dq[0].transpose(0, 1), dk[0].transpose(0, 1), dv[0].transpose(0, 1)

    def _is_block(self, tile: Tile, *others: Tile) -> bool:
        """Whether a call of these tiles is one that cuDNN computes."""
        rows, keys = tile.num_queries, tile.num_keys
        return (
            not others
            and tile.left is None
            and min(rows, keys) >= self._least
            and rows.bit_count() == keys.bit_count() == 1
            and rows <= MOST
            and (rows == keys or not tile.causal)
        )


def _statistics(lse: Tensor, q: Tensor) -> Tensor:
    """lse [Lq, Hq] in the shape that the backward takes: [1, Hq, Lq] or [1, Hq, Lq, 1], depending on the
    version of torch.
    """
    lse_1HL = lse.T.contiguous()[None]
    return lse_1HL if _statistics_dim(q.device, q.dtype, q.shape[-1]) == 3 else lse_1HL[..., None]


@cache
def _statistics_dim(device: torch.device, dtype: torch.dtype, head_dim: int) -> int:
    """Dimensions of the log-sum-exp that this torch's forward returns: a small one is run to see."""
    x = torch.zeros(1, 1, LEAST_IN_CHECKS, head_dim, dtype=dtype, device=device)
    _, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        x, x, x, None, True, 0.0, False, False, scale=1.0
    )
    return int(lse.dim())


def _heads_first(x_LHD: Tensor) -> Tensor:
    """x [L, H, D] -> [1, H, L, D], always with the strides of a contiguous x: torch caches a plan by shape
    and by the strides of some operands only, and would reuse it for others.
    """
    return x_LHD.contiguous().transpose(0, 1)[None]
