"""P-EAGLE as a `DraftAlgorithm` (draft/contract.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import LlamaConfig

from eagle3_ds.algorithms.eagle3.model import UnrollSettings
from eagle3_ds.algorithms.eagle3.supervision import TTTSupervision
from eagle3_ds.algorithms.peagle.config import build_draft_config, draft_notes, mask_warnings
from eagle3_ds.algorithms.peagle.costs import PEagleShape
from eagle3_ds.algorithms.peagle.decoding import PEagleBatchGuesser, PEagleGuesser, probe_logits
from eagle3_ds.algorithms.peagle.exported import ServerForm, SpeculatorsForm
from eagle3_ds.algorithms.peagle.model import PEagleModel
from eagle3_ds.config import Recipe
from eagle3_ds.draft.contract import LayoutForm
from eagle3_ds.draft.vocabulary import VocabularyMap


class PEagle:
    """EAGLE-3's layers; K guesses at once, those after the first from learned masks."""

    name = "peagle"
    layouts: Mapping[str, LayoutForm] = {"vllm": ServerForm(), "speculators": SpeculatorsForm()}
    served_by_vllm: Mapping[str, Any] = {"method": "eagle3", "parallel_drafting": True}
    served_by_sglang = False

    def build_config(self, target_config: Any, recipe: Recipe) -> LlamaConfig:
        captured = recipe.target.aux_layers
        # `target.aux_layers: null` captures three layers.
        num_layers = 3 if captured is None else len(captured)
        return build_draft_config(target_config, recipe.draft, num_layers, recipe.data.max_length)

    def notes(self, target_config: Any, recipe: Recipe) -> list[str]:
        return draft_notes(target_config, recipe.draft)

    def warnings_of_text(self, config: LlamaConfig, counts: Tensor) -> list[str]:
        return mask_warnings(config, counts)

    def build(self, config: LlamaConfig) -> PEagleModel:
        return PEagleModel(config)

    def supervision(self, recipe: Recipe) -> TTTSupervision:
        return TTTSupervision(recipe.draft.ttt_steps)

    def anchors(self, recipe: Recipe) -> None:
        """None: all supervised slots."""

    def live_slots_alone(self, recipe: Recipe) -> bool:
        """True for one layer. A second layer would need the first one's output at every slot for its keys."""
        return recipe.draft.num_layers == 1

    def settings(self, recipe: Recipe) -> UnrollSettings:
        return UnrollSettings(recipe.draft.ttt_steps, recipe.train.activation, recipe.train.tile_bytes)

    def shape(self, config: LlamaConfig) -> PEagleShape:
        return PEagleShape.of(config)

    def guesser(self, draft: PEagleModel, embedding: Tensor, vocabulary: VocabularyMap) -> PEagleGuesser:
        return PEagleGuesser(draft, embedding, vocabulary)

    def batch_guesser(
        self, draft: PEagleModel, embedding: Tensor, vocabulary: VocabularyMap, num_texts: int
    ) -> PEagleBatchGuesser:
        return PEagleBatchGuesser(draft, embedding, vocabulary, num_texts)

    def probe(self, draft: PEagleModel, seed: int) -> Tensor:
        return probe_logits(draft, seed)
