"""Choosing the kernel by name, or the fastest that runs."""

from __future__ import annotations

import torch

from eagle3_ds.kernels.base import AttentionKernel
from eagle3_ds.kernels.blockwise import BlockwiseKernel
from eagle3_ds.kernels.cpu import CpuKernel
from eagle3_ds.kernels.cuda import CudaKernel
from eagle3_ds.kernels.reference import ReferenceKernel

# Fastest first. `auto` never reaches the reference: blockwise runs everywhere.
KERNELS: tuple[AttentionKernel, ...] = (CudaKernel(), CpuKernel(), BlockwiseKernel(), ReferenceKernel())


def select_kernel(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionKernel:
    """The kernel called `name`; `auto` is the first of `cuda`, `cpu`, `blockwise` that runs with these tensors.

    Raises:
        ValueError: no kernel has that name, or it cannot run here; says why and which can.
    """
    reasons = {kernel.name: kernel.unavailable_reason(device, dtype, head_dim) for kernel in KERNELS}
    usable = [kernel for kernel in KERNELS if reasons[kernel.name] is None]
    if name == "auto":
        return usable[0]
    names = ", ".join(kernel.name for kernel in usable)
    if name not in reasons:
        raise ValueError(f"attention.kernel is {name!r}, but no kernel is named so. Use auto, or one of these: {names}.")
    if reasons[name] is not None:
        raise ValueError(
            f"attention.kernel {name!r} cannot run with {dtype} heads of {head_dim} on {device}: {reasons[name]}. "
            f"Use auto, or one that can: {names}."
        )
    return next(kernel for kernel in usable if kernel.name == name)
