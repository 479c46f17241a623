"""Hidden states of the target on disk: written by any rank, read row by row, imported from other trainers."""

from eagle3_ds.store.index import RowFormat
from eagle3_ds.store.reader import HiddenStateStore
from eagle3_ds.store.writer import HiddenStateWriter, required_bytes

__all__ = ["HiddenStateStore", "HiddenStateWriter", "RowFormat", "required_bytes"]
