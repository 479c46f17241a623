"""The self-check of a kernel on this machine: a small forward and backward, compared with the reference."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from eagle3_ds.kernels.base import AttentionKernel, accumulation_dtype
from eagle3_ds.kernels.reference import ReferenceKernel
from eagle3_ds.kernels.select import automatic_kernels, select_kernel
from eagle3_ds.kernels.tile import Tile

logger = logging.getLogger(__name__)

# The largest relative L2 error that rounding explains: a few units in the last place of the operands' dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}

_NUM_HEADS, _NUM_KV_HEADS = 4, 2
# A short document; a later part of a document under a sliding window; an earlier block of keys, of which each
# row's window still covers the end; and more documents, because a backward was right for one alone and wrong
# for several in one call (flash-attn-4 4.0.0b36 on an H200): short ones under the window, a long one without.
_TILES = (
    Tile(0, 30, 0, 30, True),
    Tile(30, 190, 40, 260, True, 100),
    Tile(200, 260, 260, 380, False, 40),
    Tile(260, 300, 380, 420, True, 24),
    Tile(300, 320, 420, 440, True, 24),
    Tile(320, 480, 440, 600, True),
    Tile(480, 521, 600, 641, True),
)
_NUM_QUERIES, _NUM_KEYS = 521, 641


def measured_error(kernel: AttentionKernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """The largest relative L2 error of out, lse, dq, dk and dv, against the reference in fp64 on the CPU."""
    kernel = kernel.for_short_tiles()
    generator = torch.Generator().manual_seed(0)
    queries, keys = (_NUM_QUERIES, _NUM_HEADS, head_dim), (_NUM_KEYS, _NUM_KV_HEADS, head_dim)
    operands = [torch.randn(shape, generator=generator).to(dtype) for shape in (queries, keys, keys, queries)]
    q, k, v, dout = (x.double() for x in operands)
    out, lse = ReferenceKernel().forward(q, k, v, _TILES, head_dim**-0.5)
    delta = (dout * out).sum(-1)
    wanted = _results(ReferenceKernel(), q, k, v, dout, lse, delta)
    statistics = (x.to(device, accumulation_dtype(dtype)) for x in (lse, delta))
    actual = _results(kernel, *(x.to(device) for x in operands), *statistics)
    return max(_distance(a.cpu().double(), w) for a, w in zip(actual, wanted, strict=True))


def checked_kernel(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionKernel:
    """`select_kernel`, then a check that the chosen kernel computes correctly here: of milliseconds, but that
    flash-attn 4 compiles its kernels first (40 s on an H200) and cuDNN makes plans (3 s). `auto` passes over
    a kernel that fails or does not, with a warning.

    Raises:
        ValueError: there is no such kernel, it cannot run here, it fails, or its results are wrong.
        torch.OutOfMemoryError: the device has no room for the check.
    """
    if name == "auto":
        chosen = automatic_kernels(device, dtype, head_dim)
    else:
        chosen = [select_kernel(name, device, dtype, head_dim)]
    for kernel in chosen:
        fault = _fault(kernel, device, dtype, head_dim)
        if fault is None:
            return kernel
        if kernel is not chosen[-1]:
            logger.warning("%s Taking the next.", fault)
    raise ValueError(
        f"{fault} Set attention.kernel to another, such as blockwise; `eagle3-ds doctor` checks them all."
    )


def _fault(kernel: AttentionKernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What is wrong with a kernel here; None when nothing is."""
    where = f"on {device} with {dtype} heads of {head_dim}"
    try:
        error = measured_error(kernel, device, dtype, head_dim)
    except torch.OutOfMemoryError:
        raise  # Of the device, not of the kernel.
    except RuntimeError as refusal:
        said = (str(refusal).strip().splitlines() or ["it said nothing"])[0].rstrip(".")
        return f"attention.kernel {kernel.name!r} fails {where}: {said}."
    if error <= TOLERANCE[dtype]:
        return None
    return (
        f"attention.kernel {kernel.name!r} computes wrongly {where}: its relative error against the "
        f"reference is {error:.1e}, and rounding explains {TOLERANCE[dtype]:.0e}."
    )


def _results(
    kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor
) -> list[Tensor]:
    """out, lse, dq, dk and dv. All kernels get the reference's lse and delta in backward, so that an error of
    their forward does not enter their gradients.
    """
    scale = q.shape[-1] ** -0.5
    dk, dv = torch.zeros_like(k, dtype=lse.dtype), torch.zeros_like(v, dtype=lse.dtype)
    dq = kernel.backward(dout, q, k, v, lse, delta, _TILES, scale, dk, dv)
    return [*kernel.forward(q, k, v, _TILES, scale), dq, dk, dv]


def _distance(actual: Tensor, wanted: Tensor) -> float:
    """Relative L2 error over finite entries; infinite if the two are not finite at the same places (the lse
    of a row without keys is -inf).
    """
    finite = wanted.isfinite()
    if not torch.equal(actual.isfinite(), finite):
        return float("inf")
    return float((actual[finite] - wanted[finite]).norm() / wanted[finite].norm())
