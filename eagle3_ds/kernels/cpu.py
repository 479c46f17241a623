"""The cpu kernel: torch's built-in flash attention for CPUs, through its raw operators."""

from __future__ import annotations

import torch
from torch import Tensor

from eagle3_ds.kernels.base import accumulation_dtype, sum_over_group
from eagle3_ds.kernels.squares import SquareKernel

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class CpuKernel(SquareKernel):
    """A `SquareKernel`, because the operator has no sliding window and aligns `causal` at the top left, which
    is the same as the bottom right on a square only.
    """

    name = "cpu"

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type != "cpu":
            return f"it runs on CPUs, and the device is {device}"
        if dtype not in _DTYPES:
            return f"it takes {', '.join(map(str, _DTYPES))}, not {dtype}"
        return None

    def square_forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _heads_first(q), _heads_first(k), _heads_first(v), 0.0, causal, scale=scale
        )
        return out[0].transpose(0, 1), lse[0].T

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
        num_kv_heads = k.shape[1]
        group = q.shape[1] // num_kv_heads
        # Grouped key heads make the operator's backward about 25 times slower than repeated ones (measured on
        # torch 2.13).
        wide_k, wide_v = (x if group == 1 else x.repeat_interleave(group, dim=1) for x in (k, v))
        operands = (_heads_first(x) for x in (dout, q, wide_k, wide_v, out))
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *operands, lse.T[None].contiguous(), 0.0, causal, scale=scale
        )
        dq, dk, dv = (x[0].transpose(0, 1) for x in (dq, dk, dv))
        dtype = accumulation_dtype(k.dtype)
        return dq, sum_over_group(dk, num_kv_heads, dtype), sum_over_group(dv, num_kv_heads, dtype)


def _heads_first(x_LHD: Tensor) -> Tensor:
    return x_LHD.transpose(0, 1)[None]
