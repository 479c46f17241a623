"""The flash-attn packages: FlashAttention 2, 3 and 4 through their low-level forward and backward functions.

The signatures are those of Dao-AILab/flash-attention: flash_attn/flash_attn_interface.py (2.8),
hopper/flash_api.cpp (3) and flash_attn/cute/interface.py (4). A package is imported when its kernel is first
asked for, so that none of them is needed to run another kernel.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from eagle3_ds.kernels.base import Call
from eagle3_ds.kernels.nvidia import nvidia_reason
from eagle3_ds.kernels.tile import Tile
from eagle3_ds.kernels.varlen import Lengths, VarlenKernel


class FlashAttn2Kernel(VarlenKernel):
    """The package flash-attn (2.8 or newer)."""

    name = "flash_attn2"

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if reason := nvidia_reason(device, dtype, head_dim, max_head_dim=256):
            return reason
        return _package_reason("flash-attn", (2, 8), "flash_attn.flash_attn_interface")

    def varlen_forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, causal: bool, left: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = importlib.import_module("flash_attn.flash_attn_interface")._flash_attn_varlen_forward(
            q,
            k,
            v,
            *lengths,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=causal,
            window_size_left=-1 if left is None else left,
            window_size_right=-1,
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
        dq, dk, dv = _gradients(q, k, v)
        importlib.import_module("flash_attn.flash_attn_interface")._flash_attn_varlen_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            dq,
            dk,
            dv,
            *lengths,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=causal,
            window_size_left=-1 if left is None else left,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv


class FlashAttn3Kernel(VarlenKernel):
    """The package flash-attn-3, for Hopper GPUs. The kernel calls the operators that the package registers
    with torch: their arguments are the same in all releases, those of the Python functions are not.
    """

    name = "flash_attn3"

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if reason := nvidia_reason(device, dtype, head_dim, max_head_dim=256):
            return reason
        if (major := torch.cuda.get_device_capability(device)[0]) != 9:
            return f"it is written for compute capability 9.0 (Hopper), and {device} has {major}.x"
        if head_dim > 192 and torch.are_deterministic_algorithms_enabled():
            lacking = f"it has no deterministic backward for head_dim {head_dim}"
            return f"{lacking}, and torch.use_deterministic_algorithms is on"
        return _package_reason("flash-attn-3", (3,), "flash_attn_3._C")

    def varlen_forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, causal: bool, left: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        importlib.import_module("flash_attn_3._C")
        # One split, because by default a heuristic may cut the keys and merge the parts in a second kernel.
        out, lse, *_ = torch.ops.flash_attn_3.fwd(
            q, k, v, num_splits=1, **_fa3_options(lengths, causal, left, scale)
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
        importlib.import_module("flash_attn_3._C")
        dq, dk, dv = _gradients(q, k, v)
        torch.ops.flash_attn_3.bwd(
            dout,
            q,
            k,
            v,
            out,
            lse,
            dq,
            dk,
            dv,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **_fa3_options(lengths, causal, left, scale),
        )
        return dq, dk, dv


class FlashAttn4Kernel(VarlenKernel):
    """The package flash-attn-4, for Hopper and newer GPUs. It compiles its kernels at their first calls, for
    tens of seconds.
    """

    name = "flash_attn4"

    def calls(self, tiles: Iterable[Tile], most: int | None = None) -> list[Call]:
        """In the backward, for which `most` is given, one call per tile: on an H200 the gradients of several
        documents in one call were wrong, by as much as themselves (flash-attn-4 4.0.0b36, nvidia-cutlass-dsl
        4.8.1), and those of one document right. The forward was right for both.
        """
        return super().calls(tiles) if most is None else [Call((tile,)) for tile in tiles]

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if reason := nvidia_reason(device, dtype, head_dim, max_head_dim=128):
            return reason
        if (major := torch.cuda.get_device_capability(device)[0]) < 9:
            return f"its backward needs compute capability 9.0 (Hopper) or higher, and {device} has {major}.x"
        if major >= 12 and torch.are_deterministic_algorithms_enabled():
            lacking = f"it has no deterministic backward for compute capability {major}.x"
            return f"{lacking}, and torch.use_deterministic_algorithms is on"
        return _package_reason("flash-attn-4", (4,), "flash_attn.cute.interface")

    def varlen_forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, causal: bool, left: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = importlib.import_module("flash_attn.cute.interface")._flash_attn_fwd(
            q, k, v, return_lse=True, **_fa4_options(lengths, causal, left, scale)
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
        dq, dk, dv, *_ = importlib.import_module("flash_attn.cute.interface")._flash_attn_bwd(
            q,
            k,
            v,
            out,
            dout,
            lse,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **_fa4_options(lengths, causal, left, scale),
        )
        return dq, dk, dv


def _fa3_options(lengths: Lengths, causal: bool, left: int | None, scale: float) -> dict[str, Any]:
    return {
        "cu_seqlens_q": lengths.cu_q,
        "cu_seqlens_k": lengths.cu_k,
        "max_seqlen_q": lengths.max_q,
        "max_seqlen_k": lengths.max_k,
        "softmax_scale": scale,
        "is_causal": causal,
        "window_size_left": -1 if left is None else left,
    }


def _fa4_options(lengths: Lengths, causal: bool, left: int | None, scale: float) -> dict[str, Any]:
    return {
        "cu_seqlens_q": lengths.cu_q,
        "cu_seqlens_k": lengths.cu_k,
        "max_seqlen_q": lengths.max_q,
        "max_seqlen_k": lengths.max_k,
        "softmax_scale": scale,
        "causal": causal,
        "window_size_left": left,
    }


def _gradients(*tensors: Tensor) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


def _package_reason(package: str, oldest: tuple[int, ...], module: str) -> str | None:
    """Why the package cannot be used (not installed, too old, import fails); None when it can."""
    wanted = ".".join(map(str, oldest))
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"the package {package} (>= {wanted}) is not installed"
    if tuple(int(part) for part in re.findall(r"\d+", version)) < oldest:
        return f"it needs {package} >= {wanted}, and {version} is installed"
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        return f"{package} {version} is installed, but {module} does not import ({error})"
    return None
