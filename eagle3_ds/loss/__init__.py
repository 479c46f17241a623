"""The training loss: soft cross entropy against the target, tile by tile."""

from eagle3_ds.loss.tiled import LossInputs, LossSum, tiled_soft_cross_entropy

__all__ = ["LossInputs", "LossSum", "tiled_soft_cross_entropy"]
