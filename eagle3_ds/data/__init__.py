"""From conversations to packed sequences: chat, preparation, packing, the hidden-state store and the loader."""

from eagle3_ds.data.documents import PreparedData
from eagle3_ds.data.loader import HeldoutPacks, HiddenStates, PackedLoader, SequenceSource
from eagle3_ds.data.prepare import prepare_data
from eagle3_ds.data.statistics import DataStatistics
from eagle3_ds.data.store import HiddenStateStore
from eagle3_ds.data.store_index import Layout
from eagle3_ds.data.store_writer import HiddenStateWriter, required_bytes

__all__ = [
    "DataStatistics",
    "HeldoutPacks",
    "HiddenStateStore",
    "HiddenStateWriter",
    "HiddenStates",
    "Layout",
    "PackedLoader",
    "PreparedData",
    "SequenceSource",
    "prepare_data",
    "required_bytes",
]
