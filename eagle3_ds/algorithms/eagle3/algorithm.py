"""EAGLE-3 as a `DraftAlgorithm` (draft/contract.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import LlamaConfig

from eagle3_ds.algorithms.eagle3.config import build_draft_config, draft_notes
from eagle3_ds.algorithms.eagle3.costs import Eagle3Shape
from eagle3_ds.algorithms.eagle3.decoding import Eagle3BatchGuesser, Eagle3Guesser, probe_logits
from eagle3_ds.algorithms.eagle3.exported import ServerForm, SpeculatorsForm
from eagle3_ds.algorithms.eagle3.model import DraftModel, UnrollSettings
from eagle3_ds.algorithms.eagle3.supervision import TTTSupervision
from eagle3_ds.config import Recipe
from eagle3_ds.draft.contract import LayoutForm
from eagle3_ds.draft.vocabulary import VocabularyMap


class Eagle3:
    """One decoder layer, unrolled over K training-time-test (TTT) steps; each step is one guess."""

    name = "eagle3"
    layouts: Mapping[str, LayoutForm] = {"vllm": ServerForm(), "speculators": SpeculatorsForm()}
    served_by_vllm: Mapping[str, Any] = {"method": "eagle3"}
    served_by_sglang = True

    def build_config(self, target_config: Any, recipe: Recipe) -> LlamaConfig:
        captured = recipe.target.aux_layers
        # `target.aux_layers: null` captures three layers.
        num_layers = 3 if captured is None else len(captured)
        return build_draft_config(target_config, recipe.draft, num_layers, recipe.data.max_length)

    def notes(self, target_config: Any, recipe: Recipe) -> list[str]:
        return draft_notes(target_config, recipe.draft)

    def warnings_of_text(self, config: LlamaConfig, counts: Tensor) -> list[str]:
        return []

    def build(self, config: LlamaConfig) -> DraftModel:
        return DraftModel(config)

    def supervision(self, recipe: Recipe) -> TTTSupervision:
        return TTTSupervision(recipe.draft.ttt_steps, recipe.loss.mask_alignment)

    def anchors(self, recipe: Recipe) -> None:
        """None: all supervised slots."""

    def live_slots_alone(self, recipe: Recipe) -> bool:
        """True for one layer. A second layer would need the first one's output at every slot for its keys."""
        return recipe.draft.num_layers == 1

    def settings(self, recipe: Recipe) -> UnrollSettings:
        return UnrollSettings(recipe.draft.ttt_steps, recipe.train.activation, recipe.train.tile_bytes)

    def shape(self, config: LlamaConfig) -> Eagle3Shape:
        return Eagle3Shape.of(config)

    def guesser(self, draft: DraftModel, embedding: Tensor, vocabulary: VocabularyMap) -> Eagle3Guesser:
        return Eagle3Guesser(draft, embedding, vocabulary)

    def batch_guesser(
        self, draft: DraftModel, embedding: Tensor, vocabulary: VocabularyMap, num_texts: int
    ) -> Eagle3BatchGuesser:
        return Eagle3BatchGuesser(draft, embedding, vocabulary, num_texts)

    def probe(self, draft: DraftModel, seed: int) -> Tensor:
        return probe_logits(draft, seed)
