"""The choice of a kernel: by name, or `auto` for the fastest one that runs."""

from __future__ import annotations

import torch

from eagle3_ds.kernels.base import AttentionKernel
from eagle3_ds.kernels.blockwise import BlockwiseKernel
from eagle3_ds.kernels.cpu import CpuKernel
from eagle3_ds.kernels.cuda import CudaKernel
from eagle3_ds.kernels.cudnn import CudnnKernel
from eagle3_ds.kernels.flash_attn import FlashAttn2Kernel, FlashAttn3Kernel, FlashAttn4Kernel
from eagle3_ds.kernels.npu import NpuKernel
from eagle3_ds.kernels.reference import ReferenceKernel

# `auto` takes the first that runs and suits the device, so faster kernels come first. It never gets past
# blockwise, which runs everywhere; reference, for checks, must be named.
KERNELS: tuple[AttentionKernel, ...] = (
    FlashAttn3Kernel(),
    FlashAttn4Kernel(),
    CudnnKernel(),
    FlashAttn2Kernel(),
    CudaKernel(),
    NpuKernel(),
    CpuKernel(),
    BlockwiseKernel(),
    ReferenceKernel(),
)


def select_kernel(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionKernel:
    """The kernel called `name`; `auto` is the first of `KERNELS` that runs with these tensors and
    suits the device.

    Raises:
        ValueError: no kernel has that name, or it cannot run here; the message says why, and which can.
    """
    if name == "auto":
        return automatic_kernels(device, dtype, head_dim)[0]
    named = next((kernel for kernel in KERNELS if kernel.name == name), None)
    reason = named.unavailable_reason(device, dtype, head_dim) if named else None
    if named is not None and reason is None:
        return named
    usable = ", ".join(
        kernel.name for kernel in KERNELS if kernel.unavailable_reason(device, dtype, head_dim) is None
    )
    if named is None:
        raise ValueError(
            f"attention.kernel is {name!r}, but no kernel is named so. Use auto, or one of these: {usable}."
        )
    raise ValueError(
        f"attention.kernel {name!r} cannot run with {dtype} heads of {head_dim} on {device}: {reason}. "
        f"Use auto, or one that can: {usable}."
    )


def automatic_kernels(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[AttentionKernel]:
    """Those that `auto` may take with these tensors, fastest first; blockwise is always among them."""
    return [
        kernel
        for kernel in KERNELS
        if kernel.unavailable_reason(device, dtype, head_dim) is None and kernel.suits(device)
    ]
