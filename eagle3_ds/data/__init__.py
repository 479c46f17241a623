"""From conversations to packed sequences: chat, preparation, packing and the loader."""

from eagle3_ds.data.documents import PreparedData
from eagle3_ds.data.loader import HeldoutPacks, HiddenStates, PackedLoader, SequenceSource
from eagle3_ds.data.prepare import prepare_data
from eagle3_ds.data.statistics import DataStatistics

__all__ = [
    "DataStatistics",
    "HeldoutPacks",
    "HiddenStates",
    "PackedLoader",
    "PreparedData",
    "SequenceSource",
    "prepare_data",
]
