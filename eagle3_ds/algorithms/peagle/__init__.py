"""P-EAGLE: EAGLE-3's layers, which make K guesses in parallel from learned masks (docs/peagle.md)."""

from eagle3_ds.algorithms.peagle.config import build_draft_config, draft_notes
from eagle3_ds.algorithms.peagle.costs import PEagleShape
from eagle3_ds.algorithms.peagle.model import PEagleModel

__all__ = ["PEagleModel", "PEagleShape", "build_draft_config", "draft_notes"]
