"""Who holds which slot: span plans, halos and the one cutter from a packed sequence to a rank's batch. Integers first."""

from eagle3_ds.layout.batch import LocalBatch, PackedSequence, Rows, prepare_usp_input
from eagle3_ds.layout.plan import Run, SpanPlan, attention_work

__all__ = ["LocalBatch", "PackedSequence", "Rows", "Run", "SpanPlan", "attention_work", "prepare_usp_input"]
