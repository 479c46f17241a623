"""The training loss: soft cross entropy against the target, tile by tile."""

from eagle3_ds.loss.taps import LossTaps
from eagle3_ds.loss.tiled import LossInputs, LossSum, LossTile, check_tile_bytes, loss_tiles, tiled_soft_cross_entropy

__all__ = ["LossInputs", "LossSum", "LossTaps", "LossTile", "check_tile_bytes", "loss_tiles", "tiled_soft_cross_entropy"]
