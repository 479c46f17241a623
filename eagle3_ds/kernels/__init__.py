"""Attention kernels behind one interface.

A kernel takes the mask as a list of tiles (kernels/tile.py) and returns the output and its log-sum-exp. Its
backward takes a log-sum-exp from outside, so that a softmax may span keys that the kernel has not seen.
"""

from eagle3_ds.kernels.base import AttentionKernel, TileKernel, accumulation_dtype, merge_partial
from eagle3_ds.kernels.folded import FoldedKernel
from eagle3_ds.kernels.select import KERNELS, select_kernel
from eagle3_ds.kernels.selfcheck import checked_kernel
from eagle3_ds.kernels.tile import Tile

__all__ = [
    "KERNELS",
    "AttentionKernel",
    "FoldedKernel",
    "Tile",
    "TileKernel",
    "accumulation_dtype",
    "checked_kernel",
    "merge_partial",
    "select_kernel",
]
