"""The cuda kernel: torch's built-in flash attention 2 for CUDA, through its raw operators (torch 2.11 - 2.13).

The raw backward is called because the differentiable wrappers ignore the gradient of the log-sum-exp, and because it
takes the merged log-sum-exp. Its dq is summed by atomics unless `torch.use_deterministic_algorithms` is on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eagle3_ds.kernels.base import TileKernel, out_with_delta

_DTYPES = (torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256


class CudaKernel(TileKernel):
    name = "cuda"
    takes_bands = True

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type != "cuda":
            return f"it runs on NVIDIA GPUs, and the device is {device}"
        if not torch.cuda.is_available() or torch.version.cuda is None:
            return "this torch has no CUDA device"
        if not torch.backends.cuda.is_flash_attention_available():
            return "this torch was built without flash attention"
        if dtype not in _DTYPES:
            return f"it takes {' or '.join(map(str, _DTYPES))}, not {dtype}"
        if head_dim % 8 or head_dim > _MAX_HEAD_DIM:
            return f"head_dim must be a multiple of 8, at most {_MAX_HEAD_DIM}, and is {head_dim}"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"it needs compute capability 8.0 (Ampere), and {device} has {capability[0]}.{capability[1]}"
        # These have too little shared memory for the backward at this width (torch's own sdp_utils refuses it as well).
        if 192 < head_dim <= 224 and capability in ((8, 6), (8, 9), (12, 0), (12, 1)):
            return f"compute capability {capability[0]}.{capability[1]} has no backward for head_dim {head_dim}"
        return None

    def tile_forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, left: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q[None], k[None], v[None], None, None, q.shape[0], k.shape[0], 0.0, causal, False, scale=scale, window_size_left=left
        )
        return out[0], lse[0].T

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
        # Read only under dropout, which is off.
        rng_state = torch.empty(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty((), dtype=torch.uint64, device=q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout[None],
            q[None],
            k[None],
            v[None],
            out_with_delta(dout, delta)[None],
            # The kernel computes the offsets itself: [1, Hq, Lq] without gaps.
            lse.T[None].contiguous(),
            None,
            None,
            q.shape[0],
            k.shape[0],
            0.0,
            causal,
            rng_state,
            unused,
            scale=scale,
            window_size_left=left,
        )
        return dq[0], dk[0], dv[0]
