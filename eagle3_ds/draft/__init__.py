"""What drafts of all algorithms share: the contract of an algorithm, the vocabulary map, the decoder layer
with its backward, tiles, offload and the tiled loss.
"""

from eagle3_ds.draft.contract import BatchGuesser, Draft, DraftAlgorithm, Guesser, LayoutForm, ReadText
from eagle3_ds.draft.embedding import (
    DRAFT_EMBEDDING,
    load_draft_embedding,
    project_embedding,
    save_draft_embedding,
)
from eagle3_ds.draft.geometry import (
    aux_keys,
    aux_size,
    has_own_embedding,
    sliding_window,
    target_hidden_size,
    window_keys,
)
from eagle3_ds.draft.served import DraftBatchCache, DraftCache, OneByOne
from eagle3_ds.draft.taps import LossTaps
from eagle3_ds.draft.tiled_loss import (
    LossInputs,
    LossSum,
    LossTile,
    check_tile_bytes,
    loss_tiles,
    tiled_loss,
)
from eagle3_ds.draft.tiles import slots_per_tile
from eagle3_ds.draft.vocabulary import VOCABULARY, VocabularyMap

__all__ = [
    "DRAFT_EMBEDDING",
    "BatchGuesser",
    "Draft",
    "DraftAlgorithm",
    "DraftBatchCache",
    "DraftCache",
    "Guesser",
    "LayoutForm",
    "LossInputs",
    "LossSum",
    "LossTaps",
    "LossTile",
    "OneByOne",
    "ReadText",
    "VOCABULARY",
    "VocabularyMap",
    "aux_keys",
    "aux_size",
    "check_tile_bytes",
    "has_own_embedding",
    "load_draft_embedding",
    "loss_tiles",
    "project_embedding",
    "save_draft_embedding",
    "sliding_window",
    "slots_per_tile",
    "target_hidden_size",
    "tiled_loss",
    "window_keys",
]
