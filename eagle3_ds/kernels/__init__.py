"""Attention kernels behind one interface: tiles in, (out, lse) out, and a backward under a merged
log-sum-exp.
"""

from eagle3_ds.kernels.base import AttentionKernel, TileKernel, accumulation_dtype, merge_partial
from eagle3_ds.kernels.select import KERNELS, select_kernel
from eagle3_ds.kernels.selfcheck import checked_kernel
from eagle3_ds.kernels.tile import Tile

__all__ = [
    "KERNELS",
    "AttentionKernel",
    "Tile",
    "TileKernel",
    "accumulation_dtype",
    "checked_kernel",
    "merge_partial",
    "select_kernel",
]
