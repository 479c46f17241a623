"""What formulas of bytes, calls and seconds read: a draft's sizes and one way of running it. Nothing is
computed here.
"""

from eagle3_ds.costs.setup import (
    ITEMSIZE,
    Activation,
    KVExchange,
    Setup,
    ZeroGroup,
    ZeroSettings,
)
from eagle3_ds.costs.shape import FP32, INT64, DraftShape, Flops, Parts, SequenceBytes, Traffic

__all__ = [
    "FP32",
    "INT64",
    "ITEMSIZE",
    "Activation",
    "DraftShape",
    "Flops",
    "KVExchange",
    "Parts",
    "SequenceBytes",
    "Setup",
    "Traffic",
    "ZeroGroup",
    "ZeroSettings",
]
