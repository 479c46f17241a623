"""Who holds which slot: span plans, halos and the one cutter from a packed sequence to a rank's batch.
Integers first.
"""

from eagle3_ds.layout.batch import LocalBatch, PackedSequence, Supervision, live_slots, prepare_usp_input
from eagle3_ds.layout.plan import IntArray, Run, SpanPlan, attention_work, slots_of_a_rank
from eagle3_ds.layout.rows import LocalRows, Rows, row_tiles, stream_rows

__all__ = [
    "IntArray",
    "LocalBatch",
    "LocalRows",
    "PackedSequence",
    "Rows",
    "Run",
    "SpanPlan",
    "Supervision",
    "attention_work",
    "live_slots",
    "prepare_usp_input",
    "row_tiles",
    "slots_of_a_rank",
    "stream_rows",
]
