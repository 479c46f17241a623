"""The cuda kernel: torch's built-in FlashAttention 2 for CUDA, through its raw operators (torch 2.11 to
2.13).

The raw backward takes the merged log-sum-exp as an argument; torch's differentiable wrappers use that of
their own forward and ignore its gradient. dq is summed by atomic additions, in no fixed order, unless
`torch.use_deterministic_algorithms` is on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eagle3_ds.kernels.nvidia import nvidia_reason
from eagle3_ds.kernels.varlen import Lengths, VarlenKernel


class CudaKernel(VarlenKernel):
    """torch's FlashAttention 2 for bf16 and fp16 on GPUs of compute capability 8.0 and higher."""

    name = "cuda"

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if reason := nvidia_reason(device, dtype, head_dim, max_head_dim=256):
            return reason
        if not torch.backends.cuda.is_flash_attention_available():
            return "this torch was built without flash attention"
        capability = torch.cuda.get_device_capability(device)
        # These GPUs have too little shared memory for the backward at this width; torch's own sdp_utils
        # refuses it too.
        if 192 < head_dim <= 224 and capability in ((8, 6), (8, 9), (12, 0), (12, 1)):
            return (
                f"compute capability {capability[0]}.{capability[1]} has no backward for head_dim {head_dim}"
            )
        return None

    def varlen_forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, causal: bool, left: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *lengths, 0.0, causal, False, scale=scale, window_size_left=left
        )
        return out, lse

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
        # The operator reads these only under dropout, which is off.
        rng_state = torch.empty(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty((), dtype=torch.uint64, device=q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            *lengths,
            0.0,
            causal,
            rng_state,
            unused,
            scale=scale,
            window_size_left=left,
        )
        return dq, dk, dv
