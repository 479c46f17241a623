"""The hidden-state store: the target's hidden states on disk. Any rank writes it; it is read row by row, and
can be filled from the files of other trainers.
"""

from eagle3_ds.store.index import RowFormat
from eagle3_ds.store.reader import HiddenStateStore
from eagle3_ds.store.writer import HiddenStateWriter, required_bytes

__all__ = ["HiddenStateStore", "HiddenStateWriter", "RowFormat", "required_bytes"]
