"""The EAGLE-3 draft: its decoder, the unroll over TTT steps, the vocabulary map, and the patch that puts USP in."""

from eagle3_ds.model.config import build_draft_config, sliding_window, window_keys
from eagle3_ds.model.decoder import DraftCache
from eagle3_ds.model.draft import DraftModel, UnrollSettings
from eagle3_ds.model.patching import patch_attention
from eagle3_ds.model.ttt_step import slots_per_tile
from eagle3_ds.model.vocabulary import VocabularyMap

__all__ = [
    "DraftCache",
    "DraftModel",
    "UnrollSettings",
    "VocabularyMap",
    "build_draft_config",
    "patch_attention",
    "sliding_window",
    "slots_per_tile",
    "window_keys",
]
