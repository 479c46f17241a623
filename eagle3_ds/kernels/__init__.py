"""Attention kernels behind one interface: tiles in, (out, lse) out, and a backward under a merged log-sum-exp."""

from eagle3_ds.kernels.base import AttentionKernel, Tile, TileKernel, accumulation_dtype, merge_partial
from eagle3_ds.kernels.select import KERNELS, select_kernel

__all__ = [
    "KERNELS",
    "AttentionKernel",
    "Tile",
    "TileKernel",
    "accumulation_dtype",
    "merge_partial",
    "select_kernel",
]
