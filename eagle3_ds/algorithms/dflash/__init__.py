"""DFlash: a draft of a few layers that guesses a whole block from mask tokens (docs/dflash.md)."""

from eagle3_ds.algorithms.dflash.config import build_dflash_config
from eagle3_ds.algorithms.dflash.model import DFlashModel

__all__ = ["DFlashModel", "build_dflash_config"]
