"""DFlash as a `DraftAlgorithm` (draft/contract.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import LlamaConfig

from eagle3_ds.algorithms.dflash.anchors import SampledAnchors
from eagle3_ds.algorithms.dflash.config import build_dflash_config, dflash_notes
from eagle3_ds.algorithms.dflash.costs import DFlashShape
from eagle3_ds.algorithms.dflash.decoding import DFlashBatchGuesser, DFlashGuesser, probe_logits
from eagle3_ds.algorithms.dflash.exported import ServerForm, SpeculatorsForm
from eagle3_ds.algorithms.dflash.model import DFlashModel
from eagle3_ds.algorithms.dflash.step import BlockSettings
from eagle3_ds.algorithms.dflash.supervision import BlockSupervision
from eagle3_ds.algorithms.peagle.config import mask_warnings
from eagle3_ds.config import Recipe
from eagle3_ds.draft.contract import LayoutForm
from eagle3_ds.draft.vocabulary import VocabularyMap


class DFlash:
    """A few layers that guess a block of tokens at once from mask tokens, after the target's states."""

    name = "dflash"
    layouts: Mapping[str, LayoutForm] = {"vllm": ServerForm(), "speculators": SpeculatorsForm()}

    served_by_vllm: Mapping[str, Any] = {"method": "dflash"}
    served_by_sglang = False

    def build_config(self, target_config: Any, recipe: Recipe) -> LlamaConfig:
        return build_dflash_config(
            target_config, recipe.draft, recipe.target.aux_layers, recipe.data.max_length
        )

    def notes(self, target_config: Any, recipe: Recipe) -> list[str]:
        return dflash_notes(target_config, recipe.draft)

    def warnings_of_text(self, config: LlamaConfig, counts: Tensor) -> list[str]:
        return mask_warnings(config, counts)

    def build(self, config: LlamaConfig) -> DFlashModel:
        return DFlashModel(config)

    def supervision(self, recipe: Recipe) -> BlockSupervision:
        alignment = recipe.loss.mask_alignment
        assert alignment != "reference"  # the recipe was checked
        return BlockSupervision(recipe.draft.num_guesses, alignment)

    def anchors(self, recipe: Recipe) -> SampledAnchors | None:
        if recipe.draft.anchor_share == 1.0:
            return None
        return SampledAnchors(self.supervision(recipe), recipe.draft.anchor_share, recipe.train.seed)

    def live_slots_alone(self, recipe: Recipe) -> bool:
        """True: a slot that is no anchor gives the keys and values of all layers, which need no layer."""
        return True

    def settings(self, recipe: Recipe) -> BlockSettings:
        return BlockSettings(recipe.draft.block_size, recipe.train.activation, recipe.train.tile_bytes)

    def shape(self, config: LlamaConfig) -> DFlashShape:
        return DFlashShape.of(config)

    def guesser(self, draft: DFlashModel, embedding: Tensor, vocabulary: VocabularyMap) -> DFlashGuesser:
        return DFlashGuesser(draft, embedding, vocabulary)

    def batch_guesser(
        self, draft: DFlashModel, embedding: Tensor, vocabulary: VocabularyMap, num_texts: int
    ) -> DFlashBatchGuesser:
        return DFlashBatchGuesser(draft, embedding, vocabulary, num_texts)

    def probe(self, draft: DFlashModel, seed: int) -> Tensor:
        return probe_logits(draft, seed)
