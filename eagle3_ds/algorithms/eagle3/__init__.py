"""EAGLE-3: a draft of one decoder layer, unrolled over K training-time-test steps (arXiv 2503.01840)."""

from eagle3_ds.algorithms.eagle3.config import build_draft_config, draft_notes
from eagle3_ds.algorithms.eagle3.costs import Eagle3Shape
from eagle3_ds.algorithms.eagle3.model import DraftModel, UnrollSettings

__all__ = ["DraftModel", "Eagle3Shape", "UnrollSettings", "build_draft_config", "draft_notes"]
