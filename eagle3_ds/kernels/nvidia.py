"""What all kernels for NVIDIA GPUs require of a device."""

from __future__ import annotations

import torch

HALF_DTYPES = (torch.bfloat16, torch.float16)


def nvidia_reason(device: torch.device, dtype: torch.dtype, head_dim: int, max_head_dim: int) -> str | None:
    """Why a half-precision flash kernel with heads of at most `max_head_dim` cannot run there; None when it
    can. See `AttentionKernel.unavailable_reason`.
    """
    if device.type != "cuda":
        return f"it runs on NVIDIA GPUs, and the device is {device}"
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "this torch has no CUDA device"
    if dtype not in HALF_DTYPES:
        return f"it takes {' or '.join(map(str, HALF_DTYPES))}, not {dtype}"
    if head_dim % 8 or head_dim > max_head_dim:
        return f"head_dim must be a multiple of 8, at most {max_head_dim}, and is {head_dim}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs compute capability 8.0 (Ampere) or higher, and {device} has {major}.{minor}"
    return None
