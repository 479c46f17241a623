"""Evaluating a draft by speculative decoding with its target, and plotting a run."""

from eagle3_ds.eval.evaluate import evaluate_draft, in_process, loop_warning
from eagle3_ds.eval.report import draw_report
from eagle3_ds.eval.speculative import NotLosslessError, Round, decode_alone, speculative_decode

__all__ = [
    "NotLosslessError",
    "Round",
    "draw_report",
    "evaluate_draft",
    "decode_alone",
    "in_process",
    "loop_warning",
    "speculative_decode",
]
