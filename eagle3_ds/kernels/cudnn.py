"""The cudnn kernel: torch's built-in cuDNN attention, through its raw operators. For few, long documents.

cuDNN builds a plan for every new shape of a tile, which costs too much when a pack holds many documents of
any length; torch's operator for several sequences even builds one in every call. So `auto` never chooses
this kernel. Tiles of fewer than `_SMALLEST` rows or keys go to torch's flash kernel: they have many shapes,
each of which would need a plan, and cuDNN refuses a tile of a single key.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from eagle3_ds.kernels.base import Call
from eagle3_ds.kernels.cuda import CudaKernel
from eagle3_ds.kernels.nvidia import nvidia_reason
from eagle3_ds.kernels.squares import SquareKernel
from eagle3_ds.kernels.varlen import backward_rows

_SMALLEST = 128
# Older versions demand that the gradient of the output has the strides of the output.
_OLDEST_CUDNN = 90501


class CudnnKernel(SquareKernel):
    """cuDNN for tiles of `_SMALLEST` rows and keys or more, `CudaKernel` for smaller ones."""

    name = "cudnn"

    def __init__(self) -> None:
        self._flash = CudaKernel()

    def backward_rows(self, query_size: int) -> int:
        """As those of the flash kernels."""
        return backward_rows(query_size)

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if reason := nvidia_reason(device, dtype, head_dim, max_head_dim=128):
            return reason
        version = torch.backends.cudnn.version() or 0
        if version < _OLDEST_CUDNN:
            return f"it needs cuDNN {_OLDEST_CUDNN} (9.5.1) or newer, and this torch has {version or 'none'}"
        if torch.are_deterministic_algorithms_enabled():
            return "its backward is not deterministic, and torch.use_deterministic_algorithms is on"
        return self._flash.unavailable_reason(device, dtype, head_dim)

    def call_forward(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float
    ) -> tuple[Tensor, Tensor]:
        if _is_small(call):
            return self._flash.call_forward(q, k, v, call, scale)
        return super().call_forward(q, k, v, call, scale)

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
        if _is_small(call):
            return self._flash.call_backward(dout, q, k, v, lse, delta, call, scale)
        return super().call_backward(dout, q, k, v, lse, delta, call, scale)

    def square_forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            _heads_first(q), _heads_first(k), _heads_first(v), None, True, 0.0, causal, False, scale=scale
        )
        return out[0].transpose(0, 1), lse.view(q.shape[1], q.shape[0]).T

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
        # The operator reads the two philox arguments only under dropout, which is off.
        philox = torch.empty((), dtype=torch.int64, device=q.device)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *(_heads_first(x) for x in (dout, q, k, v, out)),
            _statistics(lse, q),
            philox,
            philox,
            None,
            None,
            None,
            q.shape[0],
            k.shape[0],
            0.0,
            causal,
            scale=scale,
        )
        return dq[0].transpose(0, 1), dk[0].transpose(0, 1), dv[0].transpose(0, 1)


def _statistics(lse: Tensor, q: Tensor) -> Tensor:
    """lse [Lq, Hq] in the shape that the backward takes: [1, Hq, Lq] or [1, Hq, Lq, 1], depending on the
    version of torch.
    """
    lse_1HL = lse.T.contiguous()[None]
    return lse_1HL if _statistics_dim(q.device, q.dtype, q.shape[-1]) == 3 else lse_1HL[..., None]


@cache
def _statistics_dim(device: torch.device, dtype: torch.dtype, head_dim: int) -> int:
    """Dimensions of the log-sum-exp that this torch's forward returns: a small one is run to see."""
    x = torch.zeros(1, 1, _SMALLEST, head_dim, dtype=dtype, device=device)
    _, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        x, x, x, None, True, 0.0, False, False, scale=1.0
    )
    return int(lse.dim())


def _is_small(call: Call) -> bool:
    (tile,) = call.tiles
    return min(tile.num_queries, tile.num_keys) < _SMALLEST


def _heads_first(x_LHD: Tensor) -> Tensor:
    """x [L, H, D] -> [1, H, L, D], always with the strides of a contiguous x: torch caches a plan by shape
    and by the strides of some operands only, and would reuse it for others.
    """
    return x_LHD.contiguous().transpose(0, 1)[None]
