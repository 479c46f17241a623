"""Which rank holds which slots of a packed sequence: the span plan, the halo, and the function that cuts a
rank's batch out of a sequence.

A *packed document* is one of several documents laid end to end in a *packed sequence*. A *slot* is one
position of that sequence; guess k of slot i is about token i + 2 + k. A *span* is a stretch of consecutive
slots on one rank, and its *halo* is the few slots after it whose tokens and teacher rows the rank reads too.
"""

from eagle3_ds.layout.batch import (
    Anchors,
    LocalBatch,
    PackedSequence,
    Supervision,
    live_slots,
    prepare_usp_input,
)
from eagle3_ds.layout.plan import IntArray, Run, SpanPlan, attention_work, slots_of_a_rank
from eagle3_ds.layout.rows import LocalRows, Rows, row_tiles, stream_rows

__all__ = [
    "Anchors",
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
